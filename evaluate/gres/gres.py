"""GRES, generalised referring expression segmentation: one sentence, one mask of any number of objects, or none.

    metric = evaluate.load("/absolute/path/to/evaluate/gres")
    metric.compute(predictions=[...], references=[...])     # through evaluate, buffered by Arrow
    accumulator = metric.accumulator()                      # 55 bytes a sentence, for training loops

Both count and score with the same code: `masks.py` counts pixels, `accumulator.py` keeps the counts, `scores.py` makes
the published scores of them, `analysis.py` the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import datasets
import evaluate

from .accumulator import GresAccumulator, checked
from .analysis import Threshold, plot_curve
from .masks import encode, foreground
from .scores import PROTOCOLS

DESCRIPTION = """
gIoU, cIoU, T_acc, N_acc and Pr@X of generalised referring expression segmentation (gRefCOCO), equal to the published
evaluator, with the always-empty baseline beside them.
"""
CITATION = """
@inproceedings{GRES,
  title={{GRES}: Generalized Referring Expression Segmentation},
  author={Liu, Chang and Ding, Henghui and Jiang, Xudong},
  booktitle={CVPR},
  year={2023}
}
"""
INPUTS = """
Args:
    predictions: per sentence `mask`, a COCO RLE `{"size": [height, width], "counts": str}` before any rejection (see
        `metric.encode`), and `no_target`, a flag or the probability (0..1) that the sentence refers to nothing.
    references: per sentence `mask` and `no_target` (bool); optionally `sent_id` (repeated sentences count once),
        `image_id`, `source` (scores are also given per source when there are several), `num_targets`, `sentence`.
    compat: whose evaluator: "rela" (as published, default), "gsva", "lisa", "deris" or "propvg".
    resolution: "original" (the reference's) or the side of a square in pixels; by default what `compat` does.
    threshold: no-target probability above which a sentence is rejected; by default what `compat` does.
    details: also score groups of sentences (`num_targets=2/gIoU`, ...; see `analysis.breakdown`).
    bootstrap: number of resamples for 95 % confidence intervals (`gIoU/low`, `gIoU/high`, ...); 0 for none.
Returns:
    gIoU, cIoU, Pr@0.7, Pr@0.8, Pr@0.9, always_empty/gIoU (0..100), T_acc, N_acc (0..1).
Examples:
    >>> import numpy as np
    >>> truth = metric.encode(np.eye(4))
    >>> empty = metric.encode(np.zeros((4, 4)))
    >>> result = metric.compute(
    ...     predictions=[{"mask": truth, "no_target": False}, {"mask": truth, "no_target": 0.9}],
    ...     references=[{"mask": truth, "no_target": False}, {"mask": empty, "no_target": True}],
    ... )
    >>> result["gIoU"], result["N_acc"], result["always_empty/gIoU"]
    (100.0, 1.0, 50.0)
"""
RLE = {"size": [datasets.Value("int32")], "counts": datasets.Value("string")}
REFERENCE = {
    "mask": RLE,
    "no_target": datasets.Value("bool"),
    "sent_id": datasets.Value("int64"),
    "image_id": datasets.Value("int64"),
    "source": datasets.Value("string"),
    "num_targets": datasets.Value("int32"),
    "sentence": datasets.Value("string"),
}


class GresMetric(evaluate.Metric):
    """The metric as `evaluate.load` gives it; `accumulator`, `encode`, `foreground` and `plot_curve` come along."""

    accumulator: ClassVar[type[GresAccumulator]] = GresAccumulator
    protocols = PROTOCOLS
    encode = staticmethod(encode)
    foreground = staticmethod(foreground)
    plot_curve = staticmethod(plot_curve)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features(
                {"predictions": {"mask": RLE, "no_target": datasets.Value("float64")}, "references": REFERENCE}
            ),
            reference_urls=["https://github.com/henghuiding/ReLA"],
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
        compat: str = "rela",
        resolution: int | str | None = None,
        threshold: float | Threshold | None = None,
        details: bool = False,
        bootstrap: int = 0,
    ) -> dict[str, float]:
        accumulator = GresAccumulator(compat, resolution)
        accumulator.add_batch(predictions=predictions, references=references)
        result = accumulator.compute(threshold=threshold)
        if details:
            for group, scores in accumulator.breakdown(threshold).items():
                result |= {f"{group}/{name}": value for name, value in scores.items()}
        if bootstrap:
            for name, (low, high) in accumulator.intervals(threshold, resamples=bootstrap).items():
                result |= {f"{name}/low": low, f"{name}/high": high}
        return result
