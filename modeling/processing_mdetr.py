"""MDETR's processor: images and sentences to model inputs, rows to batches, and outputs to boxes."""

from collections.abc import Callable, Iterable, Sequence
from typing import ClassVar, NoReturn

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .boxes import cxcywh_to_xyxy, xywh_to_xyxy
from .configuration_mdetr import MdetrConfig
from .image_processing_mdetr import MdetrImageProcessor
from .referring_processor import (
    BASE_COLUMNS,
    Batch,
    Outputs,
    ReferringProcessor,
    check_rows,
    check_sizes,
    group_by_image,
    measuring_labels,
    repeat_images,
)
from .root_noun_mdetr import Span, root_nouns


class MdetrProcessor(ReferringProcessor):
    """Image processor and tokenizer in one; see `ReferringProcessor`.

    Args:
        image_processor: resizes, normalises and pads.
        tokenizer: RoBERTa's, or another fast one.
        num_positions: of the model's configuration; also the most tokens of a sentence.
        no_target_threshold: see `ReferringProcessor`. At 0.5 it changes nothing for box thresholds of 0.5 or more.
    """

    output_names: ClassVar[tuple[str, ...]] = ("logits", "pred_boxes")

    def __init__(
        self,
        image_processor: MdetrImageProcessor,
        tokenizer: PreTrainedTokenizerBase,
        num_positions: int = 256,
        no_target_threshold: float = 0.5,
        **kwargs: object,
    ) -> None:
        super().__init__(image_processor, tokenizer, no_target_threshold)
        self.num_positions = num_positions

    def _tokenize(self, sentences: list[str], max_length: int | None) -> dict[str, np.ndarray]:
        length = min(self.num_positions, max_length or self.num_positions)
        encoding = self.tokenizer(
            sentences, padding="longest", truncation=True, max_length=length, return_tensors="np"
        )
        return {name: encoding[name] for name in ("input_ids", "attention_mask")}

    def collator(
        self,
        config: MdetrConfig | None = None,
        text_column: str = "sentence",
        category_ids: Sequence[int] = (),
        training: bool = False,
        share_images: bool = False,
        uint8_pixels: bool = False,
    ) -> "MdetrCollator":
        """See `ReferringProcessor`; MDETR learns no categories, and `category_ids` are not used.

        Raises:
            ValueError: when processor and model differ in the number of positions.
        """
        if config is not None and config.num_positions != self.num_positions:
            raise ValueError(
                f"num_positions={self.num_positions} of the processor differs from num_positions="
                f"{config.num_positions} of the model: make the processor with the model's"
            )
        return MdetrCollator(self, text_column, training, share_images, uint8_pixels)

    def columns(self, training: bool, config: MdetrConfig | None = None) -> list[str]:
        """See `ReferringProcessor`. In training, objects tell which targets are crowds."""
        return [*BASE_COLUMNS, "boxes", *(["objects"] if training else [])]

    def positive_map(self, sentence: str, spans: Sequence[Span]) -> torch.Tensor:
        """(num_positions,) distribution over the sentence's tokens, equal on those that touch `spans`, else 0.

        A span that begins or ends between tokens is moved inwards by up to two characters, as in the original
        `create_positive_map`; one that still meets no token is ignored.

        Args:
            sentence: the text to which the spans refer.
            spans: (start, end) in characters.
        """
        encoding = self.tokenizer(sentence, truncation=True, max_length=self.num_positions)
        weights = torch.zeros(self.num_positions)
        for start, end in spans:
            first = _first_token(encoding.char_to_token, (start, start + 1, start + 2))
            last = _first_token(encoding.char_to_token, (end - 1, end - 2, end - 3))
            if first is not None and last is not None:
                weights[first : last + 1] = 1
        return weights / (weights.sum() + 1e-6)

    def no_target_scores(self, outputs: Outputs) -> torch.Tensor:
        """(B,) 0..1: one minus the score of the best query, so that a sentence has a target when any query has."""
        return outputs["logits"].float().softmax(-1)[..., -1].amin(-1)

    def mask_logits(self, outputs: Outputs) -> NoReturn:
        """Raises ValueError: MDETR has no masks."""
        raise ValueError("MDETR answers with boxes; use post_process_referring_detection")

    def post_process_referring_segmentation(self, outputs: Outputs, *args: object, **kwargs: object) -> NoReturn:
        """Raises ValueError: MDETR has no masks."""
        self.mask_logits(outputs)

    def post_process_referring_detection(
        self,
        outputs: Outputs,
        threshold: float = 0.7,
        target_sizes: Iterable[tuple[int, int]] | torch.Tensor | None = None,
        no_target_threshold: float | None = None,
    ) -> list[dict[str, object]]:
        """See `ReferringProcessor`. The score of a query is the probability that it is an object at all.

        As in the published evaluation, boxes are kept by their score alone, and a sentence without box has no target.
        Besides, it has none where its no-target score is greater than the threshold. A score of float32's 0.7 is below
        the threshold 0.7, as in the GREC metric.

        Returns:
            boxes are in pixels, or relative to the image (0..1) without `target_sizes`, in the order of the queries;
            where the model has that head also "scores_refexp" (n,), scores times the probability that the sentence is
            finally about the box.
        """
        boxes = cxcywh_to_xyxy(outputs["pred_boxes"].float())
        scores = 1 - outputs["logits"].float().softmax(-1)[..., -1]
        if target_sizes is not None:
            sizes = boxes.new_tensor(check_sizes(target_sizes, len(boxes)))
            boxes = boxes * sizes.flip(1).repeat(1, 2)[:, None]  # (B, 1, 4): width, height, width, height
        queries = {"boxes": boxes, "scores": scores}
        if "pred_isfinal" in outputs:
            queries["scores_refexp"] = scores * outputs["pred_isfinal"].float().sigmoid()[..., 0]
        limit = self.no_target_threshold if no_target_threshold is None else no_target_threshold
        results = []
        for b, score in enumerate(self.no_target_scores(outputs).tolist()):
            above = scores[b].double() >= threshold
            result = {name: value[b][above] for name, value in queries.items()}
            results.append({**result, "no_target": score > limit or not above.any().item(), "no_target_score": score})
        return results


class MdetrCollator:
    """Expression rows of `grefcoco.load` to a batch; an image is processed once for all rows about it.

    A sentence without target has no box: every query then learns "no object". Crowds, which the published training
    excludes from the targets, are known where rows hold `objects`.

    Args:
        processor: makes the model inputs.
        text_column: "sentence", as published, or "raw".
        training: whether to add the labels of the loss.
        share_images, uint8_pixels: see `ReferringProcessor.collator`.
    """

    def __init__(
        self,
        processor: MdetrProcessor,
        text_column: str = "sentence",
        training: bool = True,
        share_images: bool = True,
        uint8_pixels: bool = False,
    ) -> None:
        self.processor = processor
        self.uint8_pixels = uint8_pixels
        self.text_column = text_column
        self.training = training
        self.share_images = share_images

    def __call__(self, rows: Sequence[dict]) -> Batch:
        """Batch of `MdetrModel.forward` inputs with `labels`: those of `measuring_labels` and of `loss_mdetr`."""
        check_rows(rows)
        images, image_index = group_by_image(rows)
        batch = self.processor.inputs_of_rows(rows, images, image_index, self.text_column, self.uint8_pixels)
        loss_labels = self._loss_labels(rows) if self.training else {}
        batch = {**batch, "labels": {**measuring_labels(rows), **loss_labels}}
        return batch if self.share_images else repeat_images(batch)

    def _loss_labels(self, rows: Sequence[dict]) -> dict[str, torch.Tensor]:
        """Labels of `grounding_loss`. The sentence is finally about all of its boxes: it has no others."""
        targets = [relative_boxes(row) for row in rows]
        boxes = torch.zeros(len(rows), max(map(len, targets)), 4)
        positive_map = torch.zeros(*boxes.shape[:2], self.processor.num_positions)
        is_final = torch.zeros(boxes.shape[:2])
        for b, (row, target) in enumerate(zip(rows, targets, strict=True)):
            sentence, real = row[self.text_column], slice(len(target))
            boxes[b, real], is_final[b, real] = target, 1
            positive_map[b, real] = self.processor.positive_map(sentence, root_nouns(sentence))
        num_boxes = torch.tensor([len(target) for target in targets])
        return {"boxes": boxes, "positive_map": positive_map, "is_final": is_final, "num_boxes": num_boxes}


def relative_boxes(row: dict) -> torch.Tensor:
    """(targets, 4) cxcywh, 0..1, of an expression row: clipped to the image, without crowds and boxes of no area."""
    crowds = {item["ann_id"] for item in row.get("objects", ()) if item["iscrowd"]}
    boxes = [box for box, ann_id in zip(row["boxes"], row["ann_ids"], strict=True) if ann_id not in crowds]
    size = torch.tensor([row["width"], row["height"]], dtype=torch.float32)
    boxes = xywh_to_xyxy(torch.tensor(boxes, dtype=torch.float32).view(-1, 4))
    low, high = (torch.minimum(point.clamp(min=0), size) / size for point in boxes.split(2, dim=1))
    return torch.cat([(low + high) / 2, high - low], dim=1)[(high > low).all(1)]


def _first_token(char_to_token: Callable[[int], int | None], characters: Iterable[int]) -> int | None:
    """The first of these characters' tokens."""
    tokens = (char_to_token(character) for character in characters if character >= 0)
    return next((token for token in tokens if token is not None), None)


MdetrProcessor.register_for_auto_class("AutoProcessor")
