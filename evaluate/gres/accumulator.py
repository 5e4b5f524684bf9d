"""Per-sentence counts of pixels, 62 bytes a sentence, from which every score follows, in any order and process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from .analysis import breakdown, choose_threshold, curve, intervals, table
from .masks import dense_overlaps, num_pixels, rle_overlaps
from .run_lengths import as_rles
from .scores import MODES, headline
from .sentence_rows import SentenceRows, Threshold, choice, flags, number, read_columns, whole_numbers

if TYPE_CHECKING:
    import torch

ROW = np.dtype(
    [
        ("sent_id", "<i8"),  # -1: anonymous
        ("no_target_score", "<f8"),  # the prediction's flag (0 or 1) or probability
        ("intersection", "<i4"),  # pixels, before any rejection
        ("union", "<i4"),
        ("predicted", "<i4"),
        ("pixels", "<i4"),  # height x width
        ("image_id", "<i8"),  # -1: unknown
        ("num_targets", "<i4"),  # -1: unknown
        ("num_words", "u1"),  # 0: unknown; 255 and more are 255
        ("no_target", "?"),  # the truth
        ("source", "S16"),
    ]
)
COUNTS = {"intersection", "union", "predicted", "pixels"}
# what a reference may have besides its mask and no_target, and what stands for a key it lacks
OPTIONAL = {"sent_id": -1, "image_id": -1, "source": "", "num_targets": -1, "sentence": ""}


class GresAccumulator(SentenceRows):
    """Constant memory per sentence; the scores are the same for any order of sentences and number of processes.

    Sentences come as masks (`add`, `add_batch`), as bool arrays or tensors (`add_masks`), or as counts of pixels made
    elsewhere (`add_counts`). Processes exchange `state()` and `merge` it.

    Args:
        compat: whose evaluator to follow, a key of `MODES`; the default is the published one.
        resolution: where masks are compared: None as given (sizes must agree), "original" at the reference's size, an
            int on a square of that side; by default what `compat` says.
    """

    row: ClassVar[np.dtype] = ROW
    verb: ClassVar[str] = "counted"

    def __init__(self, compat: str = "rela", resolution: int | str | None = None) -> None:
        super().__init__()
        self.mode = MODES[choice("compat", compat, MODES)]
        whole = isinstance(resolution, (int, np.integer)) and not isinstance(resolution, bool)
        if not (resolution in (None, "original") or (whole and 0 < resolution < 1 << 14)):
            raise ValueError(f'resolution={resolution!r}: give "original" or the side of a square in pixels')
        self.compat = compat
        self.resolution = self.mode.resolution if resolution is None else resolution

    def add_batch(self, *, predictions: Sequence[Mapping], references: Sequence[Mapping]) -> None:
        """Add sentences as the metric's `compute` takes them: `{"mask": ..., "no_target": ...}` each.

        A mask is a run-length dictionary (`metric.encode`, pycocotools), or a numpy or torch array (height, width).
        """
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
        # where no rule reads it, no_target may be missing
        reads_truth = self.mode.only_targets or not self.mode.truth_by_mask
        answer = ["mask", "no_target"] if self.mode.none_rule != "mask" else ["mask"]
        truth = ["mask", "no_target"] if reads_truth else ["mask"]
        optional = OPTIONAL if reads_truth else {"no_target": False} | OPTIONAL
        given = read_columns(references, "reference", truth, optional)
        answers = read_columns(predictions, "prediction", answer)
        masks, truths = as_rles(answers["mask"], "prediction"), as_rles(given.pop("mask"), "reference")
        if "sentence" in given:
            given["num_words"] = [len(sentence.split()) for sentence in given.pop("sentence")]
        intersection, union, predicted = rle_overlaps(masks, truths, self.resolution, self.mode.nearest)
        self.add_counts(
            intersection=intersection,
            union=union,
            predicted=predicted,
            pixels=num_pixels(truths, self.resolution),
            no_target_score=answers.get("no_target", np.zeros(len(truths))),
            no_target=given.pop("no_target", np.zeros(len(truths), bool)),
            **given,
        )

    def add_masks(
        self,
        pred_masks: np.ndarray | torch.Tensor,
        masks: np.ndarray | torch.Tensor,
        *,
        no_target_score: Sequence[float],
        no_target: Sequence[bool],
        **columns: Sequence,
    ) -> None:
        """Bool masks (n, height, width), compared as they are and on their own device; columns as in `add_counts`."""
        if tuple(pred_masks.shape) != tuple(masks.shape) or len(masks.shape) != 3:
            raise ValueError(f"masks are (n, height, width), not {tuple(pred_masks.shape)} and {tuple(masks.shape)}")
        if not all(str(array.dtype).endswith("bool") for array in (pred_masks, masks)):
            raise ValueError(f"masks are bool, not {pred_masks.dtype} and {masks.dtype}: take a threshold first")
        intersection, union, predicted = dense_overlaps(pred_masks, masks)
        self.add_counts(
            intersection=intersection,
            union=union,
            predicted=predicted,
            pixels=np.full(len(masks), masks.shape[1] * masks.shape[2]),
            no_target_score=no_target_score,
            no_target=no_target,
            **columns,
        )

    def add_counts(
        self,
        *,
        intersection: Sequence[int],
        union: Sequence[int],
        predicted: Sequence[int],
        no_target_score: Sequence[float],
        no_target: Sequence[bool],
        **columns: Sequence,
    ) -> None:
        """Pixel counts of n raw masks (before any rejection): one entry per sentence in every column.

        Args:
            intersection, union, predicted: pixels of prediction AND truth, of prediction OR truth, of the prediction.
            no_target_score: the predicted flag, or the probability that the sentence refers to nothing.
            no_target: the truth.
            columns: any of `sent_id, image_id, source, num_targets, num_words, pixels`.
        """
        columns |= {"intersection": intersection, "union": union, "predicted": predicted}
        columns |= {"no_target_score": no_target_score, "no_target": no_target}
        unknown = {"num_targets": [-1] * len(no_target)} if "num_targets" not in columns else {}
        checked = {name: column(name, values, len(no_target)) for name, values in (columns | unknown).items()}
        self._append(len(no_target), checked)

    def compute(
        self, *, threshold: float | Threshold | None = None, expected: Iterable[int] | None = None
    ) -> dict[str, float]:
        """gIoU, cIoU, T_acc, N_acc, Pr@X and the always-empty baseline; see `scores.headline`.

        Args:
            threshold: a sentence counts as rejected above this no-target probability; by default what `compat` says.
            expected: see `rows`.
        """
        rows = self._scored_rows(expected)
        return headline(rows, self.mode, self._value(threshold, rows))

    def breakdown(self, threshold: float | Threshold | None = None) -> dict[str, dict[str, float]]:
        """See `analysis.breakdown`."""
        rows = self._scored_rows()
        return breakdown(rows, self.mode, self._value(threshold, rows))

    def intervals(
        self, threshold: float | Threshold | None = None, **options: float
    ) -> dict[str, tuple[float, float]]:
        """See `analysis.intervals`."""
        rows = self._scored_rows()
        return intervals(rows, self.mode, self._value(threshold, rows), **options)

    def table(self, threshold: float | Threshold | None = None) -> dict[str, list]:
        """See `analysis.table`."""
        rows = self._scored_rows()
        return table(rows, self.mode, self._value(threshold, rows))

    def curve(self) -> dict[str, np.ndarray]:
        """See `analysis.curve`."""
        return curve(self._scored_rows(), self.mode)

    def choose_threshold(self, by: str = "gIoU") -> Threshold:
        """See `analysis.choose_threshold`."""
        return choose_threshold(self._scored_rows(), self.mode, by)

    def _scored_rows(self, expected: Iterable[int] | None = None) -> np.ndarray:
        rows = self.rows(expected)
        return rows[~rows["no_target"]] if self.mode.only_targets else rows

    def _value(self, threshold: float | Threshold | None, rows: np.ndarray) -> float | None:
        if threshold is not None and self.mode.none_rule not in ("flag", "query"):
            raise ValueError(f"compat={self.compat!r} rejects without a threshold: leave threshold={threshold!r} out")
        if isinstance(threshold, Threshold):
            return threshold.for_rows(rows)
        return None if threshold is None else number("threshold", threshold, 0, 1)


def column(name: str, values: Sequence, length: int) -> np.ndarray:
    """One column of rows, checked; ValueError names it."""
    if len(values) != length or len(np.shape(values)) != 1:
        raise ValueError(f"{name} has shape {np.shape(values)}, there are {length} sentences")
    if name == "no_target":
        return flags(name, _numpy(values))
    if name == "source":
        names = np.char.encode(np.array([*map(str, values)], str), "utf-8") if length else np.zeros(0, "S1")
        if names.dtype.itemsize > ROW[name].itemsize:
            raise ValueError(f"{name} {max(names, key=len).decode()!r} is longer than {ROW[name].itemsize} bytes")
        return names
    if name == "no_target_score":
        scores = np.asarray(values)
        if scores.dtype.kind not in "biuf" or not ((scores >= 0) & (scores <= 1)).all():
            raise ValueError(
                "the predicted no_target is a flag or a probability, 0 to 1: apply softmax to logits first"
            )
        return scores
    if name == "num_words":
        return np.minimum(np.asarray(values), 255)
    return whole_numbers(name, _numpy(values), ROW[name], 0 if name in COUNTS else -1)


def _numpy(values: Sequence) -> Sequence:
    """Tensors as arrays; anything else as it is, for what numpy makes of it can hide a fault."""
    return np.asarray(values) if hasattr(values, "device") else values
