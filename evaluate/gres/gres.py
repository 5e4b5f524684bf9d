"""GRES: generalised referring expression segmentation, scored exactly as published."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import datasets
import evaluate

from .accumulator import GresAccumulator, complete
from .masks import encode, foreground
from .scores import PROTOCOLS

MASK = {"size": [datasets.Value("int32")], "counts": datasets.Value("string")}


class GresMetric(evaluate.Metric):
    """Generalised referring expression segmentation: per-sentence masks and the right to answer "none"."""

    protocols = PROTOCOLS
    encode = staticmethod(encode)
    foreground = staticmethod(foreground)
    accumulator: ClassVar[type[GresAccumulator]] = GresAccumulator

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="GRES: gIoU, cIoU, N_acc, T_acc and Pr@X, exactly as published.",
            citation="Liu, Ding, Jiang: GRES: Generalized Referring Expression Segmentation. CVPR 2023",
            inputs_description="GRES: gIoU, cIoU, N_acc, T_acc and Pr@X, exactly as published.",
            features=datasets.Features(
                {
                    "predictions": {"mask": MASK, "no_target": datasets.Value("float64")},
                    "references": {
                        "mask": MASK,
                        "no_target": datasets.Value("bool"),
                        "sent_id": datasets.Value("int64"),
                        "image_id": datasets.Value("int64"),
                        "source": datasets.Value("string"),
                        "num_targets": datasets.Value("int32"),
                        "sentence": datasets.Value("string"),
                    },
                }
            ),
        )

    def add_batch(self, *, predictions: Sequence[Mapping], references: Sequence[Mapping]) -> None:
        """Buffer sentences, optional reference fields filled in."""
        super().add_batch(predictions=predictions, references=[complete(reference) for reference in references])

    def add(self, *, prediction: Mapping, reference: Mapping) -> None:
        """Buffer one sentence."""
        super().add(prediction=prediction, reference=complete(reference))

    def _compute(
        self,
        predictions: Sequence[Mapping],
        references: Sequence[Mapping],
        compat: str = "rela",
        resolution: int | str | None = None,
        threshold: float | None = None,
    ) -> dict[str, float]:
        accumulator = GresAccumulator(compat, resolution)
        accumulator.add_batch(predictions=predictions, references=references)
        return accumulator.compute(threshold=threshold)
