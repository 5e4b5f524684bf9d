"""What a model gets on a split: its masks through the GRES metric, its boxes through the GREC metric, in one pass."""

from __future__ import annotations

from collections.abc import Mapping

import datasets
import numpy as np
import torch


class Measurement:
    """Counts of a few numbers per sentence, from which every score follows; the same for any number of processes.

    Args:
        rows: the expression rows that are measured, as `grefcoco.load` gives them.
        metrics: the processor's `trainer_metrics`, with both metrics.
    """

    def __init__(self, rows: datasets.Dataset, metrics: object) -> None:
        self.ids = np.asarray(rows.with_format(None)["sent_id"])
        self.metrics, self.every_object = metrics, metrics.metrics["gres"].accumulator()
        self.gres, self.grec = metrics.accumulators["gres"], metrics.accumulators["grec"]

    def add(
        self, outputs: Mapping[str, torch.Tensor], labels: dict[str, torch.Tensor], image_index: torch.Tensor | None
    ) -> None:
        """A batch: outputs of the model, with the collator's labels.

        Masks are compared at the processed size, as published; boxes in pixels of the original image.
        """
        self.metrics.add(self.metrics.reduce(outputs, labels), labels)
        if "categories" in labels and "masks" in labels:
            objects = labels["categories"] > 0
            objects = objects if image_index is None else objects[image_index]
            names = ("no_target", "sent_id", "image_id", "num_targets", "num_words")
            columns = {name: labels[name].tolist() for name in names}
            nothing = np.zeros(len(objects))
            self.every_object.add_masks(objects, labels["masks"] > 0, no_target_score=nothing, **columns)

    def state(self) -> list[np.ndarray]:
        """What other processes `merge`."""
        return [accumulator.state() for accumulator in (self.gres, self.every_object, self.grec)]

    def merge(self, state: list[np.ndarray]) -> None:
        for accumulator, part in zip((self.gres, self.every_object, self.grec), state):
            accumulator.merge(part)

    def scores(self, check: bool = False) -> dict[str, dict[str, float]]:
        """ "gres" and "grec", each where the model answers so.

        Args:
            check: raise ValueError when a sentence is missing.
        """
        expected = self.ids if check else None
        found = {"gres": self.gres, "grec": self.grec}
        return {name: part.compute(expected=expected) for name, part in found.items() if len(part)}

    def details(self) -> dict[str, dict]:
        """Baselines to hold the GRES scores against, and both tasks' scores by kind of sentence."""
        found: dict[str, dict] = {"baselines": {}, "breakdown": {}, "grec_breakdown": {}}
        if len(self.gres):
            found["baselines"]["always empty"] = _always_empty(self.gres.compute())
            found["breakdown"] = self.gres.breakdown()
        if len(self.every_object):
            found["baselines"]["every object"] = self.every_object.compute()
        if len(self.grec):
            found["grec_breakdown"] = self.grec.breakdown()
        return found

    def extremes(self, number: int) -> tuple[list[int], list[int]]:
        """Rows of the best and of the worst answers with targets: by IoU of the mask, without masks by the boxes."""
        if len(self.gres):
            table = self.gres.table()
            quality, counts = np.asarray(table["iou"]), np.asarray(table["num_targets"])
        else:
            table = self.grec.table()
            quality, counts = np.asarray(table["correct"], float), np.asarray(table["num_targets"])
        place = {sent_id: i for i, sent_id in enumerate(self.ids.tolist())}
        rows = np.array([place[sent_id] for sent_id in table["sent_id"]])[counts > 0]
        order = np.argsort(-quality[counts > 0], kind="stable")
        return rows[order[:number]].tolist(), rows[order[::-1][:number]].tolist()


def _always_empty(scores: dict[str, float]) -> dict[str, float]:
    """What answering "none" to every sentence scores, for the set that `scores` are of."""
    nothing = dict.fromkeys(("cIoU", "T_acc", "Pr@0.7", "Pr@0.8", "Pr@0.9"), 0.0)
    return {"gIoU": scores["always_empty/gIoU"], "N_acc": 1.0, **nothing}
