"""A picture and sentences in, masks at the picture's size out, and boxes where the model has an instance branch:

segment = pipeline("referring-segmentation", model=FOLDER, trust_remote_code=True)
segment("street.jpg", text=["the two people on the left", "the red bus"])
"""

import os

from transformers import BatchFeature, Pipeline
from transformers.image_utils import load_image
from transformers.pipelines.base import GenericTensor


class ReferringSegmentationPipeline(Pipeline):
    """Segments what each sentence refers to, or says that it refers to nothing."""

    _load_processor = True
    _load_image_processor = False
    _load_feature_extractor = False
    _load_tokenizer = False

    def __call__(self, image: object, text: str | list[str] | None = None, **kwargs: object) -> object:
        """One answer for a sentence, a list of them for a list.

        Args:
            image: PIL image, path or URL; or a list of {"image": .., "text": ..} for several pictures.
            text: a sentence or a list of them.
            threshold, no_target_threshold, return_rle: as `RelaProcessor.post_process_referring_segmentation` takes.
            box_threshold: least score of a box, 0.7 by default.

        Returns:
            {"sentence": str, "mask": (height, width) bool or RLE, "no_target": bool, "no_target_score": 0..1}, or a
            list, or for several pictures a list of those. A model with an instance branch adds "boxes", "scores" and
            "masks" as `RelaProcessor.post_process_referring_detection` gives them.
        """
        return super().__call__(image if text is None else {"image": image, "text": text}, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: object) -> None:
        """Model, code and, which the parent leaves out, the processor."""
        super().save_pretrained(save_directory, **kwargs)
        self.processor.save_pretrained(save_directory)

    def _sanitize_parameters(self, **kwargs: object) -> tuple[dict, dict, dict]:
        names = ("threshold", "no_target_threshold", "return_rle", "box_threshold")
        unknown = [name for name in kwargs if name not in names]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not an option of referring-segmentation: use {', '.join(names)}")
        return {}, {}, kwargs

    def preprocess(self, inputs: dict[str, object]) -> dict[str, object]:
        image, text = load_image(inputs["image"]), inputs["text"]
        features = self.processor(images=image, text=text, return_tensors="pt")
        return {**features, "text": text, "target_size": (image.height, image.width)}

    def _forward(self, model_inputs: dict[str, object]) -> dict[str, object]:
        text, target_size = model_inputs.pop("text"), model_inputs.pop("target_size")
        outputs = self.model(**model_inputs)
        names = ("pred_masks", "no_target_logits", "pred_boxes", "pred_scores", "instance_masks")
        return {
            **{name: outputs[name] for name in names if name in outputs},
            "text": text,
            "target_size": target_size,
        }

    def postprocess(
        self, model_outputs: dict[str, GenericTensor], box_threshold: float = 0.7, **options: object
    ) -> dict | list[dict]:
        text, sizes = model_outputs["text"], [model_outputs["target_size"]] * len(model_outputs["pred_masks"])
        outputs = BatchFeature(model_outputs)
        answers = self.processor.post_process_referring_segmentation(outputs, sizes, **options)
        if "pred_boxes" in model_outputs:
            verdict = {name: value for name, value in options.items() if name == "no_target_threshold"}
            found = self.processor.post_process_referring_detection(outputs, sizes, box_threshold, **verdict)
            answers = [{**instances, **answer} for instances, answer in zip(found, answers, strict=True)]
        sentences = [text] if isinstance(text, str) else text
        answers = [{"sentence": sentence, **answer} for sentence, answer in zip(sentences, answers, strict=True)]
        return answers[0] if isinstance(text, str) else answers
