"""The scores of a model on a split: from its outputs during training, or from a file of answers.

Both ways end in the accumulators of evaluate/gres and evaluate/grec, which keep a few numbers a sentence; everything
else (baselines, groups of sentences, best and worst answers) follows from those numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import datasets
import evaluate
import numpy as np
import torch
from pycocotools import mask as coco_mask
from transformers import ProcessorMixin

from grefcoco_data.masks import to_rle, xywh_to_xyxy
from scoring.answers import Answer, check_sentence_ids

METRICS = Path(__file__).resolve().parents[1] / "evaluate"
GRES, GREC = (evaluate.load(str(METRICS / name)) for name in ("gres", "grec"))
COLUMNS = ["sent_id", "image_id", "width", "height", "sentence", "no_target", "ann_ids", "boxes", "mask"]
UNREADABLE_BOX = [1, 1, 0, 0]  # matches nothing, because its corners are exchanged
BATCH = 1024  # answers of a file that are scored at once


class Measurement:
    """The accumulators of a split: the same result for any order of sentences and number of processes.

    Masks from outputs are compared at the processed size, as published; masks from answers at the image's own size
    (or at the resolution of the accumulator). Boxes are compared in pixels of the image.

    Args:
        rows: the expression rows that are measured, with `COLUMNS`.
        processor: the model's; None where answers come from a file.
        gres, grec: accumulators to fill; by default those of the published evaluators.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        processor: ProcessorMixin | None = None,
        gres: object | None = None,
        grec: object | None = None,
    ) -> None:
        check_sentence_ids(rows)
        self.rows = rows
        self.ids = np.asarray(rows.with_format(None)["sent_id"])
        self.places = {sent_id: place for place, sent_id in enumerate(self.ids.tolist())}
        self.metrics = None if processor is None else processor.trainer_metrics(GRES, GREC)
        accumulators = {} if self.metrics is None else self.metrics.accumulators
        # an accumulator without sentences is false: compare with None
        self.gres = accumulators.get("gres", gres if gres is not None else GRES.accumulator())
        self.grec = accumulators.get("grec", grec if grec is not None else GREC.accumulator())
        self.every_object = GRES.accumulator()
        self.unreadable: list[Answer] = []

    def add_outputs(
        self, outputs: object, labels: dict[str, torch.Tensor], image_index: torch.Tensor | None = None
    ) -> None:
        """A batch of model outputs, with the collator's labels."""
        self.metrics.add(self.metrics.reduce(outputs, labels), labels)
        if "categories" in labels:
            objects, truth = labels["categories"] > 0, labels["masks"] > 0.5
            objects = objects if image_index is None else objects[image_index]
            columns = {
                name: labels[name].cpu().numpy() for name in ("sent_id", "image_id", "num_targets", "no_target")
            }
            self.every_object.add_masks(objects, truth, no_target_score=np.zeros(len(truth)), **columns)

    def add_answers(self, answers: Sequence[Answer]) -> None:
        """A batch of answers to sentences of `rows`; those that are unreadable wait for `add_unreadable`."""
        rows = self._truth(answers)
        self.unreadable += [answer for answer in answers if answer.unreadable]
        pairs = [(answer, row) for answer, row in zip(answers, rows) if not answer.unreadable]
        masked = [(answer, row) for answer, row in pairs if answer.mask is not None]
        boxed = [(answer, row) for answer, row in pairs if answer.boxes is not None]
        if masked:
            self.gres.add_batch(
                predictions=[{"mask": answer.mask, "no_target": _no_target_score(answer)} for answer, _ in masked],
                references=[mask_reference(row) for _, row in masked],
            )
        if boxed:
            self.grec.add_batch(
                predictions=[{"boxes": answer.boxes, "scores": answer.scores} for answer, _ in boxed],
                references=[box_reference(row) for _, row in boxed],
            )

    def add_unreadable(self) -> None:
        """Count the unreadable answers in the tasks of the others: neither right nor a rejection."""
        rows = self._truth(self.unreadable)
        if len(self.gres):
            predictions = [{"mask": _one_pixel(*row["mask"]["size"]), "no_target": 0.0} for row in rows]
            self.gres.add_batch(predictions=predictions, references=[mask_reference(row) for row in rows])
        if len(self.grec) or not len(self.gres):
            predictions = [{"boxes": [UNREADABLE_BOX], "scores": [1.0]}] * len(rows)
            self.grec.add_batch(predictions=predictions, references=[box_reference(row) for row in rows])
        self.unreadable = []

    def _truth(self, answers: Sequence[Answer]) -> list[dict]:
        """The rows of the answered sentences."""
        truth = self.rows[[self.places[answer.sent_id] for answer in answers]]
        return [dict(zip(truth, values)) for values in zip(*truth.values())]

    def state(self) -> list[np.ndarray]:
        """What other processes `merge`."""
        return [accumulator.state() for accumulator in (self.gres, self.every_object, self.grec)]

    def merge(self, state: list[np.ndarray]) -> None:
        """Take in the `state()` of another process."""
        for accumulator, part in zip((self.gres, self.every_object, self.grec), state):
            accumulator.merge(part)

    def tasks(self) -> dict[str, object]:
        """The accumulators that hold sentences, by task: "gres", "grec"."""
        return {name: part for name, part in (("gres", self.gres), ("grec", self.grec)) if len(part)}

    def scores(self, check: bool = False) -> dict[str, dict[str, float]]:
        """ "gres" and "grec", each where the model answers so.

        Args:
            check: raise ValueError when a sentence is missing.
        """
        expected = self.ids if check else None
        return {name: accumulator.compute(expected=expected) for name, accumulator in self.tasks().items()}

    def details(self) -> dict[str, dict]:
        """What a report adds to the scores: 95 % intervals, baselines, groups of sentences, calibration of "none"."""
        details: dict[str, dict] = {"baselines": {}, "breakdown": {}, "grec_breakdown": {}}
        details["intervals"] = {name: accumulator.intervals() for name, accumulator in self.tasks().items()}
        if len(self.gres):
            details["baselines"]["always empty"] = _always_empty(self.gres.compute())
            details["breakdown"] = self.gres.breakdown()
        if len(self.every_object):
            details["baselines"]["every object"] = self.every_object.compute()
        if len(self.grec):
            details["grec_breakdown"] = self.grec.breakdown()
        answers = self._answers()
        details["calibration"] = reliability(answers["none"], answers["num_targets"] == 0)
        return details

    def examples(self, number: int) -> dict[str, list[int]]:
        """Rows to look at, up to `number` of each kind, no two of one image.

        "best" and "worst" are answers to sentences with targets, by IoU of the mask, without masks by the boxes;
        "failures" are sentences without target that were not answered "none", the most certain first.
        """
        answers = self._answers()
        has_target = answers["num_targets"] > 0
        ranked = np.argsort(-answers["quality"], kind="stable")
        ranked = ranked[has_target[ranked]]
        number_best = min(number, -(-len(np.unique(answers["image_id"][ranked])) // 2))
        best = _of_different_images(ranked, answers["image_id"], number_best)
        others = ranked[~np.isin(answers["image_id"][ranked], answers["image_id"][best])]
        certain = np.argsort(answers["none"], kind="stable")
        wrong = certain[(~has_target & (answers["quality"] < 1))[certain]]
        chosen = {"best": best, "worst": _of_different_images(others[::-1], answers["image_id"], number)}
        chosen["failures"] = _of_different_images(wrong, answers["image_id"], number)
        return {name: answers["place"][indices].tolist() for name, indices in chosen.items()}

    def _answers(self) -> dict[str, np.ndarray]:
        """Columns of the measured sentences: row, image, targets, quality of the answer and probability of "none".

        A model without masks gives as probability of "none" what its best box lacks to a score of 1.
        """
        table = {
            name: np.asarray(values) for name, values in (self.gres if len(self.gres) else self.grec).table().items()
        }
        if len(self.gres):
            quality, none = table["iou"].astype(float), table["no_target_score"]
        else:
            quality, none = table["correct"].astype(float), 1 - np.clip(table["best_score"], 0, 1)
        places = np.array([self.places[sent_id] for sent_id in table["sent_id"].tolist()])
        columns = {"place": places, "quality": quality, "none": none}
        return columns | {name: table[name] for name in ("image_id", "num_targets")}


def batches(answers: Iterable[Answer]) -> Iterator[list[Answer]]:
    """Answers in lists of up to `BATCH`."""
    answers = iter(answers)
    while batch := list(islice(answers, BATCH)):
        yield batch


def reliability(probability: np.ndarray, truth: np.ndarray, bins: int = 10) -> dict[str, object]:
    """How far a probability (n,) is the frequency of `truth` (n,): the points of a reliability diagram.

    Returns:
        `points`, for each of `bins` equal parts of 0..1 that is not empty: the number of `samples`, their mean
        `probability` and the `frequency` of truth; `ECE`, the mean distance of the two over all samples (expected
        calibration error, Naeini et al. 2015).
    """
    part = np.minimum((probability * bins).astype(int), bins - 1)
    points = [
        {
            "samples": int(np.count_nonzero(part == index)),
            "probability": float(probability[part == index].mean()),
            "frequency": float(truth[part == index].mean()),
        }
        for index in np.unique(part)
    ]
    distances = [point["samples"] * abs(point["probability"] - point["frequency"]) for point in points]
    return {"points": points, "ECE": sum(distances) / max(1, len(truth))}


def _of_different_images(indices: np.ndarray, image_ids: np.ndarray, number: int) -> np.ndarray:
    """The first `number` of `indices`, without those of which an earlier one is of the same image."""
    first = np.unique(image_ids[indices], return_index=True)[1]
    return indices[np.sort(first)[:number]]


def mask_reference(row: dict) -> dict[str, object]:
    """The reference of an expression row for the GRES metric."""
    reference = {name: row[name] for name in ("mask", "no_target", "sent_id", "image_id", "sentence")}
    return reference | {"num_targets": len(row["ann_ids"])}


def box_reference(row: dict) -> dict[str, object]:
    """The reference of an expression row for the GREC metric."""
    return {"sent_id": row["sent_id"], "image_id": row["image_id"], "boxes": xywh_to_xyxy(row["boxes"])}


def _no_target_score(answer: Answer) -> float:
    """The probability of "none"; where the model gives none, an empty mask is the answer "none"."""
    if answer.no_target is not None:
        return answer.no_target
    return float(not coco_mask.area(to_rle(answer.mask, *answer.mask["size"])[0]))


def _one_pixel(height: int, width: int) -> dict:
    """RLE of a mask of the first pixel alone: it is not empty, and as good as wrong."""
    return to_rle({"size": [height, width], "counts": [0, 1, height * width - 1]}, height, width)[0]


def _always_empty(scores: dict[str, float]) -> dict[str, float]:
    """What answering "none" to every sentence scores, for the set that `scores` are of."""
    zeros = dict.fromkeys(("cIoU", "T_acc", "Pr@0.7", "Pr@0.8", "Pr@0.9"), 0.0)
    return {"gIoU": scores["always_empty/gIoU"], "N_acc": 1.0, **zeros}
