"""Images and sentences to MDETR's inputs, expression rows to its training batches, and its outputs back to boxes."""

from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from .image_processing_mdetr import MdetrImageProcessor
from .loss_mdetr import corners
from .processing_rela import RelaProcessor, detection_labels
from .root_noun_mdetr import Span, root_nouns

NUM_POSITIONS = 256


class MdetrProcessor(RelaProcessor):
    """Image processor and tokenizer in one; pairs images and sentences as `RelaProcessor` does.

    Args:
        image_processor: resizes, normalises and pads.
        tokenizer: RoBERTa's, or another fast one.
    """

    def __init__(
        self, image_processor: MdetrImageProcessor, tokenizer: PreTrainedTokenizerBase, **kwargs: object
    ) -> None:
        super().__init__(image_processor, tokenizer, max_length=NUM_POSITIONS)

    def _tokenize(self, sentences: list[str]) -> dict[str, np.ndarray]:
        encoding = self.tokenizer(
            sentences, padding="longest", truncation=True, max_length=self.max_length, return_tensors="np"
        )
        return {name: encoding[name] for name in ("input_ids", "attention_mask")}

    def positive_map(self, sentence: str, spans: Sequence[Span]) -> torch.Tensor:
        """(256,) distribution over the sentence's tokens, equal on those that touch `spans` and 0 elsewhere.

        A span that begins or ends between tokens is moved inwards by up to two characters, as in the original
        `create_positive_map`; one that still meets no token is left out.

        Args:
            sentence: what the spans count in.
            spans: (start, end) in characters.
        """
        encoding = self.tokenizer(sentence, truncation=True, max_length=self.max_length)
        found = torch.zeros(NUM_POSITIONS)
        for start, end in spans:
            first = _first_token(encoding.char_to_token, (start, start + 1, start + 2))
            last = _first_token(encoding.char_to_token, (end - 1, end - 2, end - 3))
            if first is not None and last is not None:
                found[first : last + 1] = 1
        return found / (found.sum() + 1e-6)

    def post_process_grec(
        self,
        outputs: object,
        threshold: float = 0.7,
        target_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None,
    ) -> list[dict[str, torch.Tensor]]:
        """The boxes each sentence refers to; none where it refers to nothing.

        A score is the probability that a query is an object at all. A score of float32's 0.7 is below the threshold
        0.7, as in the GREC metric.

        Args:
            outputs: `MdetrOutput` of B sentences.
            threshold: boxes that score at least this are kept.
            target_sizes: B (height, width) of the original images in pixels; None leaves boxes relative, 0..1.

        Returns:
            for each sentence {"boxes": (n, 4) xyxy in pixels, "scores": (n,)}, in the order of the queries; where the
            model has that head also "scores_refexp" (n,), scores times the probability that the sentence is finally
            about the box.

        Raises:
            ValueError: when there are not as many sizes as sentences.
        """
        boxes = corners(outputs.pred_boxes.float())
        scores = 1 - outputs.logits.float().softmax(-1)[..., -1]
        if target_sizes is not None:
            sizes = torch.as_tensor(target_sizes, dtype=boxes.dtype, device=boxes.device).reshape(-1, 2)
            if len(sizes) != len(boxes):
                raise ValueError(
                    f"{len(sizes)} target_sizes for {len(boxes)} sentences: pass one (height, width) each"
                )
            boxes = boxes * sizes.flip(1).repeat(1, 2)[:, None]
        found = {"boxes": boxes, "scores": scores}
        if outputs.pred_isfinal is not None:
            found["scores_refexp"] = scores * outputs.pred_isfinal.float().sigmoid()[..., 0]
        kept = scores.double() >= threshold
        return [{name: value[b][kept[b]] for name, value in found.items()} for b in range(len(boxes))]

    def post_process_referring_detection(
        self,
        outputs: object,
        target_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None,
        threshold: float = 0.7,
    ) -> list[dict[str, object]]:
        """As `post_process_grec`, under the name and with the answer that `RelaProcessor` has for boxes too.

        Returns:
            for each sentence {"boxes", "scores", "no_target"}: no target where no box is kept.
        """
        answers = self.post_process_grec(outputs, threshold, target_sizes)
        return [{**answer, "no_target": not len(answer["boxes"])} for answer in answers]


class MdetrCollator:
    """Expression rows of `grefcoco.load` to a training batch; rows about the same image share its pixels.

    A sentence without target has no box: every query then learns "no object". Crowds, which the published training
    leaves out of the targets, are known where rows hold `objects`.

    Args:
        processor: makes the model inputs.
        text_column: "sentence", as published, or "raw".
    """

    def __init__(self, processor: MdetrProcessor, text_column: str = "sentence") -> None:
        self.processor = processor
        self.text_column = text_column

    def __call__(self, rows: Sequence[dict]) -> dict[str, object]:
        """Batch of `MdetrModel.forward` inputs, with the labels that `loss_mdetr` and `detection_labels` describe."""
        first = {}
        for row in rows:
            first.setdefault(row["image_id"], row)
        places = {image_id: i for i, image_id in enumerate(first)}
        sentences = [row[self.text_column] for row in rows]
        batch = self.processor(
            images=[row["image"] for row in first.values()],
            text=sentences,
            image_index=[places[row["image_id"]] for row in rows],
        )
        targets = [relative_boxes(row) for row in rows]
        boxes = torch.zeros(len(rows), max(map(len, targets)), 4)
        positive_map = torch.zeros(*boxes.shape[:2], NUM_POSITIONS)
        for b, (found, sentence) in enumerate(zip(targets, sentences, strict=True)):
            boxes[b, : len(found)] = found
            positive_map[b, : len(found)] = self.processor.positive_map(sentence, root_nouns(sentence))
        labels = {
            "boxes": boxes,
            "positive_map": positive_map,
            "num_targets": torch.tensor([len(found) for found in targets]),
            "sent_id": torch.tensor([row.get("sent_id", -1) for row in rows]),
            **detection_labels(rows),
        }
        return {**batch, "labels": labels}


def relative_boxes(row: dict) -> torch.Tensor:
    """(targets, 4) cxcywh, 0..1, of an expression row: cut to the image, without crowds and boxes of no area."""
    crowds = {item["ann_id"] for item in row.get("objects", ()) if item["iscrowd"]}
    boxes = [box for box, ann_id in zip(row["boxes"], row["ann_ids"], strict=True) if ann_id not in crowds]
    size = torch.tensor([row["width"], row["height"]], dtype=torch.float32)
    low, extent = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4).split(2, dim=1)
    low, high = (torch.minimum(corner.clamp(min=0), size) / size for corner in (low, low + extent))
    return torch.cat([(low + high) / 2, high - low], dim=1)[(high > low).all(1)]


def _first_token(char_to_token: Callable[[int], int | None], characters: Iterable[int]) -> int | None:
    found = (char_to_token(character) for character in characters if character >= 0)
    return next((token for token in found if token is not None), None)


MdetrProcessor.register_for_auto_class("AutoProcessor")
