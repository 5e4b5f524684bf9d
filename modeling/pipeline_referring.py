"""An image and sentences in; masks at the image's size and boxes out, whichever the model gives.

segment = pipeline("referring-segmentation", model=FOLDER, trust_remote_code=True)
segment("street.jpg", text=["the two people on the left", "the red bus"])
"""

import os

import torch
from transformers import Pipeline
from transformers.image_utils import load_image
from transformers.pipelines.base import GenericTensor

OPTIONS = ("mask_threshold", "box_threshold", "no_target_threshold", "return_rle")


class ReferringPipeline(Pipeline):
    """Answers which pixels and objects each sentence refers to, or that it has no target."""

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __call__(self, image: object, text: str | list[str] | None = None, **kwargs: object) -> object:
        """One answer for a sentence, a list of answers for a list.

        Args:
            image: PIL image, path or URL; or a list of {"image": .., "text": ..} for several images.
            text: a sentence or a list of them.
            mask_threshold: a pixel is target when its probability is greater, by default the processor's own;
                also named `threshold`.
            box_threshold: least score of a box, 0.7 by default.
            no_target_threshold: a sentence has no target when its score is greater; the processor's own by default.
            return_rle: give COCO run lengths instead of masks.

        Returns:
            {"sentence": str, "no_target": bool, "no_target_score": 0..1}, or a list of them, or for several images a
            list of those. A model with masks adds "mask" as `post_process_referring_segmentation` gives it; a model
            with boxes adds "boxes" and "scores" as `post_process_referring_detection` gives them, and a model with
            instance masks "masks", one RLE for each box.
        """
        return super().__call__(image if text is None else {"image": image, "text": text}, **kwargs)

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

    def preprocess(self, inputs: dict[str, object]) -> dict[str, object]:
        image, text = load_image(inputs["image"]), inputs["text"]
        features = self.processor(images=image, text=text, return_tensors="pt")
        return {**features, "text": text, "target_size": (image.height, image.width)}

    def _forward(self, model_inputs: dict[str, object]) -> dict[str, object]:
        text, target_size = model_inputs.pop("text"), model_inputs.pop("target_size")
        outputs = self.model(**model_inputs)
        tensors = {name: value for name, value in outputs.items() if isinstance(value, torch.Tensor)}
        return {**tensors, "text": text, "target_size": target_size}

    def postprocess(
        self,
        model_outputs: dict[str, GenericTensor],
        mask_threshold: float | None = None,
        box_threshold: float = 0.7,
        no_target_threshold: float | None = None,
        return_rle: bool = False,
    ) -> dict | list[dict]:
        text = model_outputs["text"]
        sentences = [text] if isinstance(text, str) else text
        sizes = [model_outputs["target_size"]] * len(sentences)
        answers: list[dict] = [{"sentence": sentence} for sentence in sentences]
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
        return answers[0] if isinstance(text, str) else answers
