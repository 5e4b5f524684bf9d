"""What a model gets on a split: its masks through the GRES metric, its boxes through the GREC metric, in one pass."""

from __future__ import annotations

from collections.abc import Sequence

import datasets
import numpy as np
import torch

from .report import corners


class Measurement:
    """Counts of a few numbers per sentence, from which every score follows; the same for any number of processes.

    Args:
        rows: the expression rows that are measured, as `grefcoco.load` gives them.
        gres, grec: the metrics as `evaluate.load` gives them.
    """

    def __init__(self, rows: datasets.Dataset, gres: object, grec: object) -> None:
        index = rows.with_format(None)
        self.ids, self.image_ids = np.asarray(index["sent_id"]), np.asarray(index["image_id"])
        self.counts = np.array([len(ids) for ids in index["ann_ids"]])
        self.words = np.array([len(sentence.split()) for sentence in index["sentence"]])
        self.boxes = index["boxes"]
        self.sizes = list(zip(index["height"], index["width"]))
        self.gres, self.every_object, self.grec = gres.accumulator(), gres.accumulator(), grec.accumulator()

    def add(
        self,
        indices: Sequence[int],
        outputs: object,
        labels: dict[str, torch.Tensor],
        image_index: torch.Tensor | None,
        processor: object,
    ) -> None:
        """A batch: `outputs` of the model for the rows at `indices`, with the collator's labels.

        Masks are compared at the processed size, as published; boxes in pixels of the original image.
        """
        if "pred_masks" in outputs:
            self._add_masks(indices, outputs, labels, image_index)
        if "pred_boxes" in outputs:
            sizes = [self.sizes[index] for index in indices]
            found = processor.post_process_grec(outputs, threshold=0.0, target_sizes=sizes)
            self.grec.add_batch(
                predictions=[{name: answer[name].cpu().numpy() for name in ("boxes", "scores")} for answer in found],
                references=[
                    {"boxes": corners(self.boxes[i]), "sent_id": self.ids[i], "image_id": self.image_ids[i]}
                    for i in indices
                ],
            )

    def _add_masks(
        self,
        indices: Sequence[int],
        outputs: object,
        labels: dict[str, torch.Tensor],
        image_index: torch.Tensor | None,
    ) -> None:
        truth = labels["masks"] > 0.5
        logits = torch.nn.functional.interpolate(outputs.pred_masks.float(), truth.shape[-2:], mode="bilinear")
        columns = {
            "sent_id": self.ids[indices],
            "image_id": self.image_ids[indices],
            "num_targets": self.counts[indices],
            "num_words": self.words[indices],
            "no_target": labels["no_target"].cpu().numpy(),
        }
        scores = outputs.no_target_logits.float().softmax(-1)[:, 1].cpu().numpy()
        self.gres.add_masks(logits[:, 1] > logits[:, 0], truth, no_target_score=scores, **columns)
        if "categories" in labels:
            objects = labels["categories"] > 0
            objects = objects if image_index is None else objects[image_index]
            self.every_object.add_masks(objects, truth, no_target_score=np.zeros(len(truth)), **columns)

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
