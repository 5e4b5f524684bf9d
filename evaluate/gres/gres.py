"""GRES, generalised referring expression segmentation: one sentence, one mask of any number of objects, or none.

    metric = evaluate.load("/absolute/path/to/evaluate/gres")
    metric.compute(predictions=[...], references=[...])     # through evaluate, buffered by Arrow
    accumulator = metric.accumulator()                      # 62 bytes a sentence, for training loops

Both count and score with the same code: `run_lengths.py` and `masks.py` count pixels, `accumulator.py` keeps the
counts, `scores.py` makes the published scores of them, `analysis.py` the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import datasets
import evaluate

from .accumulator import OPTIONAL, GresAccumulator, column
from .analysis import WORD_BINS
from .masks import foreground
from .run_lengths import as_rles, encode
from .scores import MODES, modes_table
from .sentence_rows import DirectCompute, Threshold, batches, number, plot_curve, read_columns

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
INPUTS = f"""
Args:
    predictions: per sentence `mask`, a COCO RLE `{{"size": [height, width], "counts": str or bytes}}` or an array
        (height, width), before any rejection, and `no_target`, a flag or the probability (0..1) that the sentence
        refers to nothing.
    references: per sentence `mask` and `no_target` (bool); optionally `sent_id` (repeated sentences count once),
        `image_id`, `source` (scores are also given per source when there are several), `num_targets`, `sentence`.
    compat: whose evaluator: {", ".join(MODES)}; the first is the published one and the default.
    resolution: "original" (the reference's) or the side of a square in pixels; by default what `compat` does.
    threshold: no-target probability above which a sentence is rejected; by default what `compat` does.
    details: also score groups of sentences (`num_targets=2/gIoU`, ...): by number of targets, by share of the image,
        by number of words ({", ".join(name for name, _, _ in WORD_BINS)}).
    bootstrap: number of resamples for 95 % confidence intervals (`gIoU/low`, `gIoU/high`, ...); 0 for none.
Returns:
    gIoU, cIoU, Pr@0.7, Pr@0.8, Pr@0.9, always_empty/gIoU (0..100), T_acc, N_acc (0..1).
Examples:
    >>> import numpy as np
    >>> truth = metric.encode(np.eye(4))
    >>> empty = metric.encode(np.zeros((4, 4)))
    >>> result = metric.compute(
    ...     predictions=[{{"mask": truth, "no_target": False}}, {{"mask": truth, "no_target": 0.9}}],
    ...     references=[{{"mask": truth, "no_target": False}}, {{"mask": empty, "no_target": True}}],
    ... )
    >>> result["gIoU"], result["N_acc"], result["always_empty/gIoU"]
    (100.0, 1.0, 50.0)
"""
OPTIONS = ["compat", "resolution", "threshold", "details", "bootstrap"]
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


class GresMetric(DirectCompute, evaluate.Metric):
    """The metric as `evaluate.load` gives it, with `accumulator`, `encode`, `foreground` and `plot_curve`."""

    accumulator: ClassVar[type[GresAccumulator]] = GresAccumulator
    modes = MODES
    modes_table = staticmethod(modes_table)
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

    def plain(
        self, predictions: Sequence[Mapping], references: Sequence[Mapping]
    ) -> tuple[list[Mapping], list[Mapping]]:
        """Inputs as Arrow holds them: every key of a reference, and masks with strings of text."""
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
        keys = ["mask", "no_target"]
        answers = read_columns(predictions, "prediction", keys)
        truths = read_columns(references, "reference", keys, OPTIONAL)
        for columns, side in ((answers, "prediction"), (truths, "reference")):
            columns["mask"] = [_storable(mask) for mask in as_rles(columns["mask"], side)]
        length = len(references)
        answers["no_target"] = column("no_target_score", answers["no_target"], length).tolist()
        for name in truths.keys() & {"no_target", "sent_id", "image_id", "num_targets"}:
            truths[name] = column(name, truths[name], length).tolist()
        defaults = {name: [default] * length for name, default in OPTIONAL.items()}
        return _entries(answers), _entries(defaults | truths)

    def check_options(self, options: Mapping[str, object]) -> None:
        """Raise ValueError for an option of `compute` that does not exist or has no sense."""
        if unknown := options.keys() - OPTIONS:
            raise ValueError(f"unknown option {', '.join(sorted(unknown))}: the options are {', '.join(OPTIONS)}")
        GresAccumulator(options.get("compat", "rela"), options.get("resolution"))
        number("bootstrap", options.get("bootstrap", 0), 0, 1e9)

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
        for answers, truths in batches(predictions, references):
            accumulator.add_batch(predictions=answers, references=truths)
        result = accumulator.compute(threshold=threshold)
        if details:
            for group, scores in accumulator.breakdown(threshold).items():
                result |= {f"{group}/{name}": value for name, value in scores.items()}
        if bootstrap:
            for name, (low, high) in accumulator.intervals(threshold, resamples=bootstrap).items():
                result |= {f"{name}/low": low, f"{name}/high": high}
        return result


def _entries(columns: Mapping[str, Sequence]) -> list[dict]:
    return [dict(zip(columns, values)) for values in zip(*columns.values())]


def _storable(mask: Mapping) -> dict:
    counts = mask["counts"]
    return {"size": list(mask["size"]), "counts": counts.decode("latin-1") if isinstance(counts, bytes) else counts}
