"""Per-sentence counts: 55 bytes a sentence in whatever order and process it came, from which every score follows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .analysis import Threshold, breakdown, choose_threshold, curve, intervals, table
from .masks import dense_overlaps, resize, rle_overlaps
from .scores import PROTOCOLS, headline

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
        ("image_id", "<i4"),  # -1: unknown
        ("num_targets", "i1"),  # -1: unknown
        ("num_words", "u1"),  # 0: unknown; 255 and more are 255
        ("no_target", "?"),  # the truth
        ("source", "S16"),
    ]
)
PREDICTION_KEYS = {"mask", "no_target"}
REFERENCE_KEYS = {"mask", "no_target"}
REFERENCE_DEFAULTS = {"sent_id": -1, "image_id": -1, "source": "", "num_targets": -1, "sentence": ""}


class GresAccumulator:
    """Counts now, scores later: constant memory per sentence, the same result for any order and number of processes.

    Sentences come as run-length masks (`add`, `add_batch`), as bool arrays or tensors (`add_masks`), or as counts of
    pixels made elsewhere (`add_counts`). Processes exchange `state()` and `merge` it.

    Args:
        compat: whose evaluator to follow, a key of `PROTOCOLS`; the default is the published one.
        resolution: where masks are compared: None as given (sizes must agree), "original" at the reference's size, an
            int on a square of that side; by default what `compat` says.
    """

    def __init__(self, compat: str = "rela", resolution: int | str | None = None) -> None:
        if compat not in PROTOCOLS:
            raise ValueError(f"compat={compat!r} is none of {', '.join(PROTOCOLS)}")
        if not (resolution in (None, "original") or (isinstance(resolution, int) and resolution > 0)):
            raise ValueError(f'resolution={resolution!r}: give "original" or the side of a square')
        self.protocol = PROTOCOLS[compat]
        self.resolution = self.protocol.resolution if resolution is None else resolution
        self._buffer = bytearray()

    def __len__(self) -> int:
        return len(self._buffer) // ROW.itemsize

    def add(self, *, prediction: Mapping, reference: Mapping) -> None:
        """One sentence; see `add_batch`."""
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(self, *, predictions: Sequence[Mapping], references: Sequence[Mapping]) -> None:
        """Sentences as `{"mask": RLE, "no_target": ...}` dictionaries, as the metric's `compute` takes them."""
        predictions, references = checked(predictions, references)
        masks = [prediction["mask"] for prediction in predictions]
        truths = [reference["mask"] for reference in references]
        if self.resolution is not None:
            original = self.resolution == "original"
            sizes = [truth["size"] if original else [self.resolution] * 2 for truth in truths]
            masks, truths = resize(masks, sizes, "prediction"), resize(truths, sizes, "reference")
        intersection, union, predicted = rle_overlaps(masks, truths)
        self.add_counts(
            intersection=intersection,
            union=union,
            predicted=predicted,
            pixels=[truth["size"][0] * truth["size"][1] for truth in truths],
            no_target_score=[prediction["no_target"] for prediction in predictions],
            no_target=[reference["no_target"] for reference in references],
            sent_id=[reference["sent_id"] for reference in references],
            image_id=[reference["image_id"] for reference in references],
            source=[reference["source"] for reference in references],
            num_targets=[reference["num_targets"] for reference in references],
            num_words=[len(reference["sentence"].split()) for reference in references],
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
        rows = np.zeros(len(no_target), ROW)
        rows["sent_id"] = rows["image_id"] = rows["num_targets"] = -1
        columns |= {"intersection": intersection, "union": union, "predicted": predicted}
        columns |= {"no_target_score": no_target_score, "no_target": no_target}
        for name, values in columns.items():
            rows[name] = _column(name, values, len(rows))
        if not ((rows["no_target_score"] >= 0) & (rows["no_target_score"] <= 1)).all():
            raise ValueError(
                "the predicted no_target is a flag or a probability, 0 to 1: apply softmax to logits first"
            )
        self._buffer += rows.tobytes()

    def state(self) -> np.ndarray:
        """All rows as bytes, uint8 (n, 55): a small array to send to other processes."""
        return np.frombuffer(bytes(self._buffer), np.uint8).reshape(-1, ROW.itemsize)

    def merge(self, state: np.ndarray | torch.Tensor) -> None:
        """Take in another process's `state()`. Sentences that both hold are counted once, see `rows`."""
        if len(state.shape) != 2 or state.shape[1] != ROW.itemsize:
            raise ValueError(f"a state is uint8 (n, {ROW.itemsize}), this one is {tuple(state.shape)}")
        self._buffer += np.asarray(state, np.uint8).tobytes()

    def rows(self, expected: Iterable[int] | None = None) -> np.ndarray:
        """The sentences as a structured array (`ROW`), in the order of their ids, repeated ones once.

        A distributed sampler repeats sentences to fill its last batch: equal rows of one id are one sentence.

        Args:
            expected: the ids that should be there, when gaps and strangers are to be found.

        Raises:
            ValueError: one id has two different rows, or ids are missing or unexpected.
        """
        rows = np.frombuffer(bytes(self._buffer), ROW)
        rows = rows[np.argsort(rows["sent_id"], kind="stable")]
        repeated = (rows["sent_id"][1:] == rows["sent_id"][:-1]) & (rows["sent_id"][1:] >= 0)
        if (clash := repeated & (rows[1:] != rows[:-1])).any():
            raise ValueError(
                f"sentence {rows['sent_id'][1:][clash][0]} was counted twice with different results: "
                "give every sentence to one process, or drop the padding with accelerator.gather_for_metrics"
            )
        rows = rows[np.concatenate([[True], ~repeated])] if len(rows) else rows
        if expected is not None:
            _refuse_gaps(rows["sent_id"], np.fromiter(expected, np.int64))
        return rows

    def compute(
        self, *, threshold: float | Threshold | None = None, expected: Iterable[int] | None = None
    ) -> dict[str, float]:
        """gIoU, cIoU, T_acc, N_acc, Pr@X and the always-empty baseline; see `scores.headline`.

        Args:
            threshold: a sentence counts as rejected above this no-target probability; by default what `compat` says.
            expected: see `rows`.
        """
        rows = self.rows(expected)
        return headline(rows, self.protocol, _value(threshold, rows))

    def breakdown(self, threshold: float | Threshold | None = None) -> dict[str, dict[str, float]]:
        """See `analysis.breakdown`."""
        rows = self.rows()
        return breakdown(rows, self.protocol, _value(threshold, rows))

    def intervals(
        self, threshold: float | Threshold | None = None, **options: float
    ) -> dict[str, tuple[float, float]]:
        """See `analysis.intervals`."""
        rows = self.rows()
        return intervals(rows, self.protocol, _value(threshold, rows), **options)

    def table(self, threshold: float | Threshold | None = None) -> dict[str, list]:
        """See `analysis.table`."""
        rows = self.rows()
        return table(rows, self.protocol, _value(threshold, rows))

    def curve(self) -> dict[str, np.ndarray]:
        """See `analysis.curve`."""
        return curve(self.rows(), self.protocol)

    def choose_threshold(self, by: str = "gIoU") -> Threshold:
        """See `analysis.choose_threshold`."""
        return choose_threshold(self.rows(), self.protocol, by)


def checked(predictions: Sequence[Mapping], references: Sequence[Mapping]) -> tuple[list[dict], list[dict]]:
    """Both as they should be: predictions with their own keys only, references with every optional one filled in.

    Raises:
        ValueError: unlike numbers, a key that is missing, or one that no reference has.
    """
    if len(predictions) != len(references):
        raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
    for name, keys, entries in (
        ("prediction", PREDICTION_KEYS, predictions),
        ("reference", REFERENCE_KEYS, references),
    ):
        for index, entry in enumerate(entries):
            if not keys <= entry.keys():
                raise ValueError(f"{name} {index} lacks {', '.join(sorted(keys - entry.keys()))}")
    for index, reference in enumerate(references):
        if unknown := reference.keys() - REFERENCE_KEYS - REFERENCE_DEFAULTS.keys():
            known = ", ".join([*sorted(REFERENCE_KEYS), *REFERENCE_DEFAULTS])
            raise ValueError(f"reference {index} has {', '.join(sorted(unknown))}: its keys can be {known}")
    kept = [{key: prediction[key] for key in PREDICTION_KEYS} for prediction in predictions]
    return kept, [{**REFERENCE_DEFAULTS, **reference} for reference in references]


def _value(threshold: float | Threshold | None, rows: np.ndarray) -> float | None:
    return threshold.for_rows(rows) if isinstance(threshold, Threshold) else threshold


def _column(name: str, values: Sequence, length: int) -> np.ndarray:
    column = np.asarray(values)
    kind = ROW[name]
    if column.shape != (length,):
        raise ValueError(f"{name} has shape {column.shape}, there are {length} sentences")
    if kind.kind == "S":
        column = np.char.encode(column.astype(str), "utf-8") if length else column
        if column.dtype.itemsize > kind.itemsize:
            raise ValueError(f"{name} {max(column, key=len).decode()!r} is longer than {kind.itemsize} bytes")
    elif name == "num_words":
        column = np.minimum(column, 255)
    elif kind.kind in "iu" and length and (column.astype(kind) != column).any():
        raise ValueError(f"{name} runs from {column.min()} to {column.max()}, beyond what a row holds ({kind})")
    return column


def _refuse_gaps(found: np.ndarray, expected: np.ndarray) -> None:
    missing = np.setdiff1d(expected, found)
    strange = np.setdiff1d(found, expected)
    if len(missing) or len(strange):
        raise ValueError(
            f"of {len(expected)} expected sentences {len(missing)} are missing (first: {missing[:3].tolist()}) and "
            f"{len(strange)} are not expected (first: {strange[:3].tolist()}): right split, all processes merged?"
        )
