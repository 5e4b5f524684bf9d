"""GREC, generalised referring expression comprehension: one sentence, any number of boxes, or none.

    metric = evaluate.load("/absolute/path/to/evaluate/grec")
    metric.compute(predictions=[...], references=[...])     # through evaluate, buffered by Arrow
    accumulator = metric.accumulator()                      # 28 bytes a sentence, for training loops

`matching.py` pairs boxes, `ties.py` says which of equal pairs, `accumulator.py` keeps and scores the outcome,
`average_precision.py` is COCO's AP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import datasets
import evaluate

from .accumulator import GrecAccumulator, checked
from .average_precision import average_precision
from .matching import overlaps
from .ties import first_of_topk

DESCRIPTION = """
F1_score (the share of sentences with F1 = 1), T_acc and N_acc of generalised referring expression comprehension
(gRefCOCO), equal to the published evaluator, with the always-empty baseline beside them; COCO AP on request.
"""
CITATION = """
@article{GREC,
  title={{GREC}: Generalized Referring Expression Comprehension},
  author={He, Shuting and Ding, Henghui and Liu, Chang and Jiang, Xudong},
  journal={arXiv preprint arXiv:2308.16182},
  year={2023}
}
"""
INPUTS = """
Args:
    predictions: per sentence `boxes`, (n, 4) x0, y0, x1, y1 in pixels, and `scores` (n,), before any threshold.
    references: per sentence `boxes`, (m, 4), none where it refers to nothing; optionally `sent_id` (repeated sentences
        count once) and `image_id`.
    thresh_score, thresh_iou, thresh_F1: least score of a box, overlap of a pair, F1 of a sentence (0.7, 0.5, 1.0).
    iou: "giou" (generalised, as published; default) or "iou" (as the paper words it).
    compat: "published" (default), or "mmdet" for the numbers of MMDetection's metric.
    ap: "pycocotools" or "hotcoco" to add AP, AP50 and AP75; None for none.
    details: also score sentences by number of targets (`num_targets=2/F1_score`, ...).
    bootstrap: number of resamples for 95 % confidence intervals (`F1_score/low`, `F1_score/high`, ...); 0 for none.
Returns:
    F1_score, T_acc, N_acc, always_empty/F1_score and what was asked for, all 0..1.
Examples:
    >>> result = metric.compute(
    ...     predictions=[{"boxes": [[0, 0, 9, 9], [5, 5, 8, 8]], "scores": [0.9, 0.2]}, {"boxes": [], "scores": []}],
    ...     references=[{"boxes": [[0, 0, 10, 9]]}, {"boxes": []}],
    ... )
    >>> result["F1_score"], result["N_acc"], result["always_empty/F1_score"]
    (1.0, 1.0, 0.5)
"""
BOXES = [[datasets.Value("float32")]]


class GrecMetric(evaluate.Metric):
    """The metric as `evaluate.load` gives it; `accumulator`, `average_precision` and `overlaps` come along."""

    accumulator: ClassVar[type[GrecAccumulator]] = GrecAccumulator
    protocols = ("published", "mmdet")
    average_precision = staticmethod(average_precision)
    overlaps = staticmethod(overlaps)
    first_of_topk = staticmethod(first_of_topk)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {
                    "predictions": {"boxes": BOXES, "scores": [datasets.Value("float32")]},
                    "references": {
                        "boxes": BOXES,
                        "sent_id": datasets.Value("int64"),
                        "image_id": datasets.Value("int64"),
                    },
                }
            ),
            reference_urls=["https://github.com/henghuiding/gRefCOCO"],
        )

    def add_batch(self, *, predictions: Sequence[Mapping], references: Sequence[Mapping]) -> None:
        """Buffer sentences; what a reference leaves out is filled in."""
        predictions, references = checked(predictions, references)
        super().add_batch(predictions=predictions, references=references)

    def add(self, *, prediction: Mapping, reference: Mapping) -> None:
        """Buffer one sentence."""
        (prediction,), (reference,) = checked([prediction], [reference])
        super().add(prediction=prediction, reference=reference)

    def _compute(
        self,
        predictions: Sequence[Mapping],
        references: Sequence[Mapping],
        ap: str | None = None,
        details: bool = False,
        bootstrap: int = 0,
        **options: float | str,
    ) -> dict[str, float]:
        accumulator = GrecAccumulator(**options)
        accumulator.add_batch(predictions=predictions, references=references)
        result = accumulator.compute()
        if ap is not None:
            result |= average_precision(predictions, references, ap)
        if details:
            for group, scores in accumulator.breakdown().items():
                result |= {f"{group}/{name}": value for name, value in scores.items()}
        if bootstrap:
            for name, (low, high) in accumulator.intervals(resamples=bootstrap).items():
                result |= {f"{name}/low": low, f"{name}/high": high}
        return result
