"""Reward functions for TRL's GRPOTrainer, on the rows of `scoring.messages`; each gives 0 to 1 for a completion.

    trainer = GRPOTrainer(model, [rewards.f1, rewards.grammar_obeyed], arguments, train_dataset=rows)

The columns that they read are those of the rows; TRL repeats them for each completion of a prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from grefcoco_data.masks import covered_area, encode_mask, xywh_to_xyxy
from scoring.grammars import Parsed, parse
from scoring.measurement import GREC, UNREADABLE_BOX

Completions = Sequence[str] | Sequence[list[dict]]
Segmenter = Callable[[Image.Image, np.ndarray], np.ndarray]


def grammar_obeyed(prompts: Sequence, completions: Completions, **columns: Sequence) -> list[float]:
    """1 for an answer that can be read: boxes or "none"."""
    return [float(answer.outcome != "unreadable") for answer in _read(completions, columns)]


def f1(prompts: Sequence, completions: Completions, **columns: Sequence) -> list[float]:
    """F1 of the boxes, matched as by the GREC metric; of a sentence without target 1 for the answer "none"."""
    counts = GREC.accumulator()
    for answer, boxes in zip(_read(completions, columns), columns["boxes"], strict=True):
        own = [UNREADABLE_BOX] if answer.outcome == "unreadable" else answer.boxes
        counts.add(prediction={"boxes": own, "scores": [1.0] * len(own)}, reference={"boxes": xywh_to_xyxy(boxes)})
    rows = counts.rows()
    boxes = rows["kept"] + rows["num_targets"]
    return np.divide(2.0 * rows["matched"], boxes, out=np.ones(len(rows)), where=boxes > 0).tolist()


def none_answered(prompts: Sequence, completions: Completions, **columns: Sequence) -> list[float]:
    """1 for "none" where there is no target and for boxes where there is one."""
    right = {True: "none", False: "boxes"}
    answers = zip(_read(completions, columns), columns["no_target"], strict=True)
    return [float(answer.outcome == right[bool(no_target)]) for answer, no_target in answers]


class MaskIou:
    """IoU of the masks of the boxes, and 1 for "none" where there is no target.

    Args:
        segmenter: makes bool masks (n, height, width) of an image and boxes (n, 4), as `scoring.peers.Segmenter`;
            they are compared with the true mask. Without it, the filled boxes of answer and truth are compared.
    """

    __name__ = "mask_iou"  # TRL logs the reward under it

    def __init__(self, segmenter: Segmenter | None = None) -> None:
        self.segmenter = segmenter

    def __call__(self, prompts: Sequence, completions: Completions, **columns: Sequence) -> list[float]:
        names = ("no_target", "boxes", "mask", "images", "width", "height")
        rows = [dict(zip(names, values)) for values in zip(*(columns[name] for name in names))]
        return [self._iou(answer, row) for answer, row in zip(_read(completions, columns), rows, strict=True)]

    def _iou(self, answer: Parsed, row: dict) -> float:
        if row["no_target"] or answer.outcome != "boxes":
            return float(row["no_target"] and answer.outcome == "none")
        if self.segmenter is None:
            mask, truth = (_filled(boxes, row) for boxes in (answer.boxes, xywh_to_xyxy(row["boxes"])))
        else:
            mask = self.segmenter(row["images"][0], np.asarray(answer.boxes, np.float32)).any(0)
            truth = row["mask"]
            mask = encode_mask(mask)
        return float(coco_mask.iou([mask], [truth], [0])[0, 0])


mask_iou = MaskIou()


def _filled(boxes: Sequence[Sequence[float]], row: dict) -> dict:
    """RLE of the pixels that the boxes x0, y0, x1, y1 cover."""
    return encode_mask(covered_area(boxes, (row["height"], row["width"])))


def _read(completions: Completions, columns: dict[str, Sequence]) -> list[Parsed]:
    """The answers in completions, conversational or plain."""
    texts = [text if isinstance(text, str) else _text(text[-1]["content"]) for text in completions]
    sizes = zip(columns["grammar"], texts, columns["width"], columns["height"], strict=True)
    return [parse(grammar, text, width, height) for grammar, text, width, height in sizes]


def _text(content: str | list[dict]) -> str:
    """The text of a message, whose content may be a list of parts."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
