"""Answers: what a model says of each sentence, as JSON lines that any model can write.

    {"sent_id": 7, "mask": {"size": [480, 640], "counts": "..."}, "no_target": 0.02}
    {"sent_id": 8, "boxes": [[9, 9, 80, 70]], "scores": [0.9], "no_target": 0.1}

A line holds the keys that apply: `mask` is a COCO run-length mask of the image's size, `boxes` are x0, y0, x1, y1 in
pixels of the image with one score (0..1) each, before any threshold; `no_target` is the probability (0..1) that the
sentence refers to nothing. Models that answer in words keep them in `answer`; `unreadable` marks an answer that could
not be understood, which is not a rejection.
"""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import datasets
import numpy as np
import pyarrow.compute as pc

from scoring.grammars import parse

if TYPE_CHECKING:
    from transformers import ProcessorMixin

BOX_THRESHOLD = 0.7  # published for GREC


@dataclass
class Answer:
    """One sentence's answer; None where a model does not say. The fields are the keys of a line."""

    sent_id: int
    mask: dict | None = None
    boxes: list[list[float]] | None = None
    scores: list[float] | None = None
    no_target: float | None = None
    answer: str | None = None
    unreadable: bool = False

    def kept_boxes(self, threshold: float = BOX_THRESHOLD) -> np.ndarray:
        """(n, 4) float32 x0, y0, x1, y1: the boxes that score at least `threshold`."""
        boxes = [box for box, score in zip(self.boxes or (), self.scores or ()) if score >= threshold]
        return np.asarray(boxes, np.float32).reshape(-1, 4)

    def rejects(self, no_target_threshold: float = 0.5, box_threshold: float = BOX_THRESHOLD) -> bool:
        """Whether the answer is "none": by its probability, and without a mask also when no box is kept."""
        if self.unreadable:
            return False
        if self.no_target is not None and self.no_target > no_target_threshold:
            return True
        return self.mask is None and not len(self.kept_boxes(box_threshold))

    def to_json(self) -> str:
        """The line, without what the model does not say."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return json.dumps({name: value for name, value in values.items() if value is not None and value is not False})


def answers_of(processor: ProcessorMixin, outputs: object, rows: Sequence[dict]) -> list[Answer]:
    """The answers in a model's outputs: masks and boxes at the images' own sizes, all boxes with their scores.

    Args:
        processor: a `ReferringProcessor`.
        outputs: of the model for B sentences.
        rows: the B expression rows, with `sent_id`, `height` and `width`.
    """
    sizes = [(row["height"], row["width"]) for row in rows]
    scores = processor.no_target_scores(outputs).tolist()
    answers = [Answer(row["sent_id"], no_target=score) for row, score in zip(rows, scores, strict=True)]
    if "pred_masks" in outputs:
        masks = processor.post_process_referring_segmentation(outputs, target_sizes=sizes, return_rle=True)
        for answer, result in zip(answers, masks, strict=True):
            answer.mask = result["mask"]
    if "pred_boxes" in outputs:
        boxes = processor.post_process_referring_detection(outputs, 0.0, sizes)
        for answer, result in zip(answers, boxes, strict=True):
            answer.boxes, answer.scores = result["boxes"].tolist(), result["scores"].tolist()
    return answers


def read_text(grammar: str, text: str | None, row: dict) -> Answer:
    """The answer of a language model, with its raw text; boxes score 1.

    Args:
        grammar: a key of `scoring.grammars.GRAMMARS`.
        row: with `sent_id`, `width` and `height`.
    """
    boxes, outcome = parse(grammar, text, row["width"], row["height"])
    boxes = [[round(x, 2) for x in box] for box in boxes]
    scores = [1.0] * len(boxes)
    return Answer(row["sent_id"], boxes=boxes, scores=scores, answer=text, unreadable=outcome == "unreadable")


def read_answers(path: Path, sent_ids: Container[int]) -> Iterator[Answer]:
    """The answers in a file of JSON lines.

    Raises:
        ValueError: a line that is no answer, or answers a sentence that is not among `sent_ids`; names the line.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            answer = _parse_line(line, f"{path}, line {number}")
            if answer.sent_id not in sent_ids:
                raise ValueError(f"{path}, line {number}: sentence {answer.sent_id} is not of this split")
            yield answer


def parse_answer(line: str) -> Answer:
    """One JSON line as an `Answer`. Raises ValueError, TypeError or KeyError for anything else."""
    values = json.loads(line)
    if not isinstance(values, dict) or type(values.get("sent_id")) is not int:
        raise ValueError("a JSON object with an integer sent_id was expected")
    if unknown := values.keys() - {field.name for field in fields(Answer)}:
        raise ValueError(f"unknown key {min(unknown)!r}")
    answer = Answer(**values)
    if answer.mask is not None:
        answer.mask = {"size": [int(side) for side in answer.mask["size"]], "counts": answer.mask["counts"]}
    if answer.no_target is not None:
        answer.no_target = float(answer.no_target)
        if not 0 <= answer.no_target <= 1:
            raise ValueError(f"no_target is {answer.no_target}; a probability of 0 to 1 was expected")
    if (answer.boxes is None) != (answer.scores is None):
        raise ValueError("boxes and scores belong together")
    if answer.boxes is not None:
        _check_boxes(answer.boxes, answer.scores)
    return answer


def _parse_line(line: str, place: str) -> Answer:
    try:
        return parse_answer(line)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise ValueError(f"{place} is no answer ({reason})") from None


def _check_boxes(boxes: list[list[float]], scores: list[float]) -> None:
    if len(boxes) != len(scores):
        raise ValueError(f"{len(boxes)} boxes and {len(scores)} scores")
    for box, score in zip(boxes, scores):
        if len(box) != 4 or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in (*box, score)):
            raise ValueError(f"box {box} with score {score}; four finite numbers and one were expected")


def check_sentence_ids(rows: datasets.Dataset) -> None:
    """Raise ValueError when one `sent_id` of expression rows stands for several sentences: answers go by it."""
    names = [name for name in ("sent_id", "image_id", "sentence") if name in rows.column_names]
    table = rows.select_columns(names).with_format("arrow")[:]
    counts = table.group_by(names).aggregate([]).group_by("sent_id").aggregate([([], "count_all")])
    repeated = counts.filter(pc.greater(counts["count_all"], 1))
    if len(repeated):
        raise ValueError(
            f"{len(repeated)} values of sent_id stand for several sentences each (first: {repeated['sent_id'][0]}), "
            "and answers go by it: number the sentences of the refs file anew, and build again"
        )
