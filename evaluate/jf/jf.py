"""J&F of sentences about videos (MeViS): one sentence, one mask a frame of any number of objects, or none.

    metric = evaluate.load("/absolute/path/to/evaluate/jf")
    metric.compute(predictions=[...], references=[...])     # through evaluate, buffered by Arrow
    accumulator = metric.accumulator()                      # 51 bytes a sentence, for training loops

`run_lengths.py` reads masks, `boundaries.py` scores frames, `accumulator.py` keeps a row a sentence and makes the
scores, `modes.py` says what other evaluators do with answers that are not complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import datasets
import evaluate

from .accumulator import OPTIONAL, JfAccumulator, stable_id
from .boundaries import frame_scores
from .modes import MODES, modes_table
from .run_lengths import Rle, as_rles, encode
from .sentence_rows import DirectCompute, batches, flags, number, read_columns

DESCRIPTION = """
J, F and J&F of sentences about videos (MeViS, Ref-YouTube-VOS), equal to the published DAVIS code frame by frame,
N_acc and T_acc for sentences without target, and the always-empty baseline beside them.
"""
CITATION = """
@inproceedings{MeViS,
  title={{MeViS}: A Large-scale Benchmark for Video Segmentation with Motion Expressions},
  author={Ding, Henghui and Liu, Chang and He, Shuting and Jiang, Xudong and Loy, Chen Change},
  booktitle={ICCV},
  year={2023}
}
"""
INPUTS = f"""
Args:
    predictions: per sentence `masks`, one a frame: a COCO RLE `{{"size": [height, width], "counts": str or bytes}}` or
        an array (height, width). "Nothing" is an empty mask on every frame.
    references: per sentence `masks`, one a frame, of all its targets together, and `no_target` (bool); optionally
        `video_id` and `exp_id` (str; for messages, and so that repeated sentences count once), `sent_id`,
        `num_targets`.
    compat: whose evaluator, where answers are not complete: {", ".join(MODES)}; the first is the default.
    details: also score groups of sentences (`num_targets=2/J&F`, ...): by number of targets, by share of the frames
        that show a target.
    bootstrap: number of resamples for 95 % confidence intervals over videos (`J&F/low`, `J&F/high`, ...); 0 for none.
Returns:
    J, F, J&F, J&F/targets, N_acc, T_acc, always_empty/J&F and, where a sentence has no target, Final; all 0..1.
Examples:
    >>> import numpy as np
    >>> left, right = (metric.encode(np.eye(8, k=k)) for k in (0, 5))
    >>> empty = metric.encode(np.zeros((8, 8)))
    >>> result = metric.compute(
    ...     predictions=[{{"masks": [left, left]}}, {{"masks": [empty, empty]}}],
    ...     references=[
    ...         {{"masks": [left, right], "no_target": False}},
    ...         {{"masks": [empty, empty], "no_target": True}},
    ...     ],
    ... )
    >>> result["J"], result["N_acc"], result["always_empty/J&F"]
    (0.75, 1.0, 0.5)
"""
OPTIONS = ["compat", "details", "bootstrap"]
MASKS = [{"size": [datasets.Value("int32")], "counts": datasets.Value("string")}]
REFERENCE = {
    "masks": MASKS,
    "no_target": datasets.Value("bool"),
    "sent_id": datasets.Value("int64"),
    "video_id": datasets.Value("string"),
    "exp_id": datasets.Value("string"),
    "num_targets": datasets.Value("int32"),
}


class JfMetric(DirectCompute, evaluate.Metric):
    """The metric as `evaluate.load` gives it, with `accumulator`, `encode`, `frame_scores` and `stable_id`."""

    accumulator: ClassVar[type[JfAccumulator]] = JfAccumulator
    modes = MODES
    modes_table = staticmethod(modes_table)
    encode = staticmethod(encode)
    frame_scores = staticmethod(frame_scores)
    stable_id = staticmethod(stable_id)

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=DESCRIPTION,
            citation=CITATION,
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": {"masks": MASKS}, "references": REFERENCE}),
            reference_urls=["https://github.com/henghuiding/MeViS"],
        )

    def plain(
        self, predictions: Sequence[Mapping], references: Sequence[Mapping]
    ) -> tuple[list[Mapping], list[Mapping]]:
        """Inputs as Arrow holds them: every key of a reference, and masks with strings of text."""
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
        answers = read_columns(predictions, "prediction", ["masks"])
        truths = read_columns(references, "reference", ["masks", "no_target"], OPTIONAL)
        for columns, side in ((answers, "prediction"), (truths, "reference")):
            columns["masks"] = [_storable(masks, f"{side} {index}") for index, masks in enumerate(columns["masks"])]
        truths["no_target"] = flags("no_target", truths["no_target"]).tolist()
        defaults = {name: [default] * len(references) for name, default in OPTIONAL.items()}
        return _entries(answers), _entries(defaults | truths)

    def check_options(self, options: Mapping[str, object]) -> None:
        """Raise ValueError for an option of `compute` that does not exist or has no sense."""
        if unknown := options.keys() - OPTIONS:
            raise ValueError(f"unknown option {', '.join(sorted(unknown))}: the options are {', '.join(OPTIONS)}")
        JfAccumulator(options.get("compat", "published"))
        number("bootstrap", options.get("bootstrap", 0), 0, 1e9)

    def _compute(
        self,
        predictions: Sequence[Mapping],
        references: Sequence[Mapping],
        compat: str = "published",
        details: bool = False,
        bootstrap: int = 0,
    ) -> dict[str, float]:
        accumulator = JfAccumulator(compat)
        for answers, truths in batches(predictions, references):
            accumulator.add_batch(predictions=answers, references=truths)
        result = accumulator.compute()
        if details:
            for group, scores in accumulator.breakdown().items():
                result |= {f"{group}/{name}": value for name, value in scores.items()}
        if bootstrap:
            for name, (low, high) in accumulator.intervals(resamples=bootstrap).items():
                result |= {f"{name}/low": low, f"{name}/high": high}
        return result


def _storable(masks: Sequence[Rle | None] | None, name: str) -> list[dict | None]:
    given = iter(as_rles([mask for mask in masks or () if mask is not None], f"{name}, frame"))
    return [None if mask is None else _text(next(given)) for mask in masks or ()]


def _text(mask: Rle) -> dict:
    counts = mask["counts"]
    return {"size": mask["size"], "counts": counts.decode("latin-1") if isinstance(counts, bytes) else counts}


def _entries(columns: Mapping[str, Sequence]) -> list[dict]:
    return [dict(zip(columns, values)) for values in zip(*columns.values())]
