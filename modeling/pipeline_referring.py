"""An image and sentences in; masks at the image's size and boxes out, whichever the model gives.

segment = pipeline("referring-segmentation", model=FOLDER, trust_remote_code=True)  # or two objects
segment("street.jpg", text=["the two people on the left", "the red bus"])
"""

import itertools
import os
from collections.abc import Iterable, Iterator, Mapping

import torch
from transformers import AutoModel, Pipeline
from transformers.pipelines import PIPELINE_REGISTRY
from transformers.pipelines.base import GenericTensor

from .image_inputs import read_image
from .referring_processor import flat_sentences

TASK = "referring-segmentation"
OPTIONS = ("mask_threshold", "box_threshold", "no_target_threshold", "return_rle")


class ReferringPipeline(Pipeline):
    """Answers which pixels and objects each sentence refers to, or that it has no target."""

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        if not hasattr(self.processor, "no_target_threshold"):  # of ReferringProcessor, also from a model's own files
            config = self.model.config
            raise ValueError(
                f"{config.name_or_path} is a {config.model_type} model, which has no referring-segmentation: "
                "measure it with `python -m scoring predict`, or use the pipeline of its own task"
            )

    def __call__(self, image: object, text: str | list[str] | None = None, **kwargs: object) -> object:
        """One answer for a sentence, a list of answers for a list.

        Args:
            image: path, URL, PIL image, array or tensor; or a list, a data set or a generator of
                {"image": .., "text": ..} for several images.
            text: a sentence or a list of them.
            batch_size: images that the model gets at once, 1 by default; each with all of its sentences.
            mask_threshold: a pixel is target when its probability is greater, by default the processor's own;
                also named `threshold`.
            box_threshold: least score of a box, 0.7 by default.
            no_target_threshold: a sentence has no target when its score is greater; the processor's own by default.
            return_rle: give COCO run lengths instead of masks, and lists instead of tensors: plain JSON.

        Returns:
            {"sentence": str, "no_target": bool, "no_target_score": 0..1}, or a list of them, or for several images a
            list of those. A model with masks adds "mask" as `post_process_referring_segmentation` gives it; a model
            with boxes adds "boxes" and "scores" as `post_process_referring_detection` gives them, and a model with
            instance masks "masks", one RLE for each box.

        Raises:
            ValueError: for an image or a sentence that cannot be read, no sentences, or an unknown option.
        """
        if text is not None and isinstance(image, list | tuple):
            raise ValueError('text for a list of images: pass a list of {"image": .., "text": ..}')
        return super().__call__(image if text is None else {"image": image, "text": text}, **kwargs)

    def get_iterator(
        self,
        inputs: Iterable[dict[str, object]],
        num_workers: int,
        batch_size: int,
        preprocess_params: dict,
        forward_params: dict,
        postprocess_params: dict,
    ) -> Iterator[dict | list[dict]]:
        """Answers image by image; a batch holds different numbers of sentences an image, so it is made here."""
        remaining = iter(inputs)
        while batch := list(itertools.islice(remaining, batch_size)):
            outputs = self.forward(self.preprocess(batch, **preprocess_params), **forward_params)
            yield from self.postprocess(outputs, **postprocess_params)

    def run_single(
        self, inputs: dict[str, object], preprocess_params: dict, forward_params: dict, postprocess_params: dict
    ) -> dict | list[dict]:
        return next(self.get_iterator([inputs], 0, 1, preprocess_params, forward_params, postprocess_params))

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: object) -> None:
        """Save model, code and processor (which the parent class does not save)."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    def _sanitize_parameters(self, **kwargs: object) -> tuple[dict, dict, dict]:
        if "threshold" in kwargs:  # transformers' name
            kwargs["mask_threshold"] = kwargs.pop("threshold")
        unknown = [name for name in kwargs if name not in OPTIONS]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not an option of referring-segmentation: use {', '.join(OPTIONS)}")
        return {}, {}, kwargs

    def preprocess(self, batch: list[dict[str, object]]) -> dict[str, object]:
        """Model inputs of the sentences of all images, and what belongs to each image."""
        for item in batch:
            if not isinstance(item, Mapping) or not {"image", "text"} <= item.keys():
                raise ValueError('an image without text: pass text=.. or {"image": .., "text": ..}')
        sentences = [flat_sentences(item["text"])[0] for item in batch]
        prepare = self.processor.image_processor.process_image
        images = [prepare(read_image(item["image"])) for item in batch]
        features = self.processor(images=images, text=sentences, return_tensors="pt")
        sizes = [(image.height, image.width) for image in images]
        return {**features, "texts": [item["text"] for item in batch], "sentences": sentences, "target_sizes": sizes}

    def _forward(self, model_inputs: dict[str, object]) -> dict[str, object]:
        extra = {name: model_inputs.pop(name) for name in ("texts", "sentences", "target_sizes")}
        outputs = self.model(**model_inputs)
        return {**{name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}, **extra}

    def postprocess(
        self,
        model_outputs: dict[str, GenericTensor],
        mask_threshold: float | None = None,
        box_threshold: float = 0.7,
        no_target_threshold: float | None = None,
        return_rle: bool = False,
    ) -> list[dict | list[dict]]:
        """The answers of each image."""
        sentences, sizes = model_outputs["sentences"], model_outputs["target_sizes"]
        sizes = [size for size, group in zip(sizes, sentences, strict=True) for _ in group]
        answers: list[dict] = [{"sentence": sentence} for group in sentences for sentence in group]
        if "pred_boxes" in model_outputs:
            options = {"return_masks": True} if "instance_masks" in model_outputs else {}
            boxes = self.processor.post_process_referring_detection(
                model_outputs, box_threshold, sizes, no_target_threshold, **options
            )
            answers = [{**answer, **part} for answer, part in zip(answers, boxes, strict=True)]
        if "pred_masks" in model_outputs:
            options = {} if mask_threshold is None else {"threshold": mask_threshold}
            masks = self.processor.post_process_referring_segmentation(
                model_outputs,
                target_sizes=sizes,
                no_target_threshold=no_target_threshold,
                return_rle=return_rle,
                **options,
            )
            answers = [{**answer, **part} for answer, part in zip(answers, masks, strict=True)]
        if return_rle:
            answers = [{name: _plain(value) for name, value in answer.items()} for answer in answers]
        remaining = iter(answers)
        groups = [list(itertools.islice(remaining, len(group))) for group in sentences]
        return [
            group[0] if isinstance(text, str) else group
            for text, group in zip(model_outputs["texts"], groups, strict=True)
        ]


def _plain(value: object) -> object:
    return value.tolist() if isinstance(value, torch.Tensor) else value


if TASK not in PIPELINE_REGISTRY.supported_tasks:  # by the same code of another repository
    PIPELINE_REGISTRY.register_pipeline(TASK, ReferringPipeline, AutoModel)
