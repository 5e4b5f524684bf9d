"""GREC, generalised referring expression comprehension: one sentence, any number of boxes, or none.

    metric = evaluate.load("/absolute/path/to/evaluate/grec")
    metric.compute(predictions=[...], references=[...])     # through evaluate, buffered by Arrow
    accumulator = metric.accumulator()                      # 40 bytes a sentence, for training loops

`matching.py` pairs boxes, `ties.py` says which of equal pairs, `accumulator.py` keeps and scores the outcome,
`average_precision.py` is COCO's AP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import datasets
import evaluate
import numpy as np

from .accumulator import OPTIONAL, ROW, GrecAccumulator
from .average_precision import BACKENDS, average_precision
from .boxes import join_boxes, join_scores, refuse_bad_boxes
from .matching import overlaps
from .modes import MODES, modes_table
from .sentence_rows import DirectCompute, Threshold, batches, choice, number, plot_curve, read_columns, whole_numbers
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
INPUTS = f"""
Args:
    predictions: per sentence `boxes`, (n, 4) x0, y0, x1, y1 in pixels, and `scores` (n,), before any threshold.
    references: per sentence `boxes`, (m, 4), none where it refers to nothing; optionally `sent_id` (repeated sentences
        count once) and `image_id`.
    thresh_score, thresh_iou, thresh_F1: least score of a box, overlap of a pair, F1 of a sentence (0.7, 0.5, 1.0).
    threshold: of the score, in place of `thresh_score`: a number, or a `Threshold` of `choose_threshold`.
    iou: "giou" (generalised, as published) or "iou" (as the paper words it); by default what `compat` does.
    compat: whose evaluator: {", ".join(MODES)}; the first is the default.
    batch_size: sentences of a batch, for compat="simvg", which takes the mean over batches.
    ap: "pycocotools" or "hotcoco" to add AP, AP50 and AP75; None for none.
    details: also score sentences by number of targets (`num_targets=2/F1_score`, ...).
    bootstrap: number of resamples for 95 % confidence intervals (`F1_score/low`, `F1_score/high`, ...); 0 for none.
Returns:
    F1_score, T_acc, N_acc, always_empty/F1_score and what was asked for, all 0..1.
Examples:
    >>> result = metric.compute(
    ...     predictions=[
    ...         {{"boxes": [[0, 0, 9, 9], [5, 5, 8, 8]], "scores": [0.9, 0.2]}},
    ...         {{"boxes": [], "scores": []}},
    ...     ],
    ...     references=[{{"boxes": [[0, 0, 10, 9]]}}, {{"boxes": []}}],
    ... )
    >>> result["F1_score"], result["N_acc"], result["always_empty/F1_score"]
    (1.0, 1.0, 0.5)
"""
OPTIONS = ["ap", "details", "bootstrap", "threshold"]
SETTINGS = ["thresh_score", "thresh_iou", "thresh_F1", "iou", "compat", "batch_size"]
BOXES = [[datasets.Value("float32")]]


class GrecMetric(DirectCompute, evaluate.Metric):
    """The metric as `evaluate.load` gives it, with `accumulator`, `average_precision`, `overlaps`, `plot_curve`."""

    accumulator: ClassVar[type[GrecAccumulator]] = GrecAccumulator
    modes = MODES
    modes_table = staticmethod(modes_table)
    average_precision = staticmethod(average_precision)
    overlaps = staticmethod(overlaps)
    first_of_topk = staticmethod(first_of_topk)
    plot_curve = staticmethod(plot_curve)

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

    def plain(
        self, predictions: Sequence[Mapping], references: Sequence[Mapping]
    ) -> tuple[list[Mapping], list[Mapping]]:
        """Inputs as Arrow holds them: lists, and every key of a reference."""
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
        answers = read_columns(predictions, "prediction", ["boxes", "scores"])
        truths = read_columns(references, "reference", ["boxes"], OPTIONAL)
        boxes, num_boxes = join_boxes(answers["boxes"], "prediction")
        scores, num_scores = join_scores(answers["scores"])
        targets, num_targets = join_boxes(truths["boxes"], "reference")
        refuse_bad_boxes(boxes, num_boxes, num_scores, targets, num_targets)
        for columns, name, values, lengths in (
            (answers, "boxes", boxes, num_boxes),
            (answers, "scores", scores, num_scores),
            (truths, "boxes", targets, num_targets),
        ):
            columns[name] = [part.tolist() for part in np.split(values, np.cumsum(lengths))[:-1]]
        for name in truths.keys() & OPTIONAL.keys():
            truths[name] = whole_numbers(name, truths[name], ROW[name]).tolist()
        defaults = {name: [default] * len(references) for name, default in OPTIONAL.items()}
        return _entries(answers), _entries(defaults | truths)

    def check_options(self, options: Mapping[str, object]) -> None:
        """Raise ValueError for an option of `compute` that does not exist or has no sense."""
        if unknown := options.keys() - {*OPTIONS, *SETTINGS}:
            names = ", ".join([*SETTINGS, *OPTIONS])
            raise ValueError(f"unknown option {', '.join(sorted(unknown))}: the options are {names}")
        GrecAccumulator(**{name: value for name, value in options.items() if name in SETTINGS})
        if options.get("ap") is not None:
            choice("ap", options["ap"], BACKENDS)
        number("bootstrap", options.get("bootstrap", 0), 0, 1e9)

    def _compute(
        self,
        predictions: Sequence[Mapping],
        references: Sequence[Mapping],
        ap: str | None = None,
        details: bool = False,
        bootstrap: int = 0,
        threshold: float | Threshold | None = None,
        **settings: float | str,
    ) -> dict[str, float]:
        accumulator = GrecAccumulator(**settings)
        for answers, truths in batches(predictions, references):
            accumulator.add_batch(predictions=answers, references=truths)
        result = accumulator.compute(threshold=threshold)
        if ap is not None:
            result |= average_precision([*predictions], [*references], ap)
        if details:
            for group, scores in accumulator.breakdown(threshold).items():
                result |= {f"{group}/{name}": value for name, value in scores.items()}
        if bootstrap:
            for name, (low, high) in accumulator.intervals(threshold, resamples=bootstrap).items():
                result |= {f"{name}/low": low, f"{name}/high": high}
        return result


def _entries(columns: Mapping[str, Sequence]) -> list[dict]:
    return [dict(zip(columns, values)) for values in zip(*columns.values())]
