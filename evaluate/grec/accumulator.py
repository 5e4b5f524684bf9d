"""Per-sentence verdicts on boxes: 28 bytes a sentence, in whatever order and process it came, and their scores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from .matching import count_matches, valid_boxes

if TYPE_CHECKING:
    import torch

ROW = np.dtype(
    [
        ("sent_id", "<i8"),  # -1: anonymous
        ("image_id", "<i4"),  # -1: unknown
        ("best_score", "<f4"),  # of all predictions, -inf without any
        ("matched", "<i4"),
        ("kept", "<i4"),  # predictions at or above the score threshold
        ("num_targets", "<i4"),
    ]
)
PREDICTION_KEYS = {"boxes", "scores"}
REFERENCE_KEYS = {"boxes"}
REFERENCE_DEFAULTS = {"sent_id": -1, "image_id": -1}


class GrecAccumulator:
    """Matches now, scores later: constant memory per sentence, the same result for any order and number of processes.

    Args:
        thresh_score: predictions scoring below are dropped; scores are float32, so a float32 0.7 is below 0.7.
        thresh_iou: least overlap of a matched pair.
        thresh_F1: least F1 of a sentence that counts as correct.
        iou: "giou", generalised IoU as the published code has it, or "iou", as the paper words it.
        compat: "published", or "mmdet" for the numbers of MMDetection's metric: plain IoU, 0 of two boxes without
            area, a float32 0.7 reaches 0.7, and only the first true box of a sentence is looked at (a bug there).
    """

    def __init__(
        self,
        *,
        thresh_score: float = 0.7,
        thresh_iou: float = 0.5,
        thresh_F1: float = 1.0,
        iou: str = "giou",
        compat: str = "published",
    ) -> None:
        if iou not in ("giou", "iou"):
            raise ValueError(f'iou={iou!r}: choose "giou" (as published) or "iou"')
        if compat not in ("published", "mmdet"):
            raise ValueError(f'compat={compat!r}: choose "published" or "mmdet"')
        self.thresh_score, self.thresh_iou, self.thresh_F1 = thresh_score, thresh_iou, thresh_F1
        self.only_first = compat == "mmdet"
        self.generalised = iou == "giou" and not self.only_first
        self._buffer = bytearray()

    def __len__(self) -> int:
        return len(self._buffer) // ROW.itemsize

    def add(self, *, prediction: Mapping, reference: Mapping) -> None:
        """One sentence; see `add_batch`."""
        self.add_batch(predictions=[prediction], references=[reference])

    def add_batch(self, *, predictions: Sequence[Mapping], references: Sequence[Mapping]) -> None:
        """Sentences, each with any number of boxes (lists, arrays or CPU tensors), pixels x0, y0, x1, y1.

        Args:
            predictions: `boxes` (n, 4) and `scores` (n,) before any threshold. A box with nan, infinite or exchanged
                corners matches nothing, but is a prediction; a nan score is below any threshold.
            references: `boxes` (m, 4), none where the sentence refers to nothing; optionally `sent_id`, `image_id`.

        Raises:
            ValueError: boxes and scores differ in number, or a true box has nan, infinite or exchanged corners.
        """
        predictions, references = checked(predictions, references)
        boxes, number = join_boxes([prediction["boxes"] for prediction in predictions])
        scores, score_number = join_scores([prediction["scores"] for prediction in predictions])
        truths, num_targets = join_boxes([reference["boxes"] for reference in references])
        _refuse_bad_input(number, score_number, truths, num_targets)
        sentence = np.repeat(np.arange(len(number)), number)
        best_score = np.full(len(number), -np.inf, np.float32)
        np.fmax.at(best_score, sentence, scores)
        kept = (
            scores >= np.float32(self.thresh_score)
            if self.only_first
            else scores.astype(np.float64) >= self.thresh_score
        )
        sentence = sentence[kept]
        # the published evaluator sorts by score, then by box: it decides which of equal pairs is taken
        boxes = boxes[kept][np.lexsort((*-boxes[kept].T[::-1], -scores[kept], sentence))]
        num_kept = np.bincount(sentence, minlength=len(number))
        num_truths = np.minimum(num_targets, 1) if self.only_first else num_targets
        if self.only_first:
            truths = truths[(np.cumsum(num_targets) - num_targets)[num_targets > 0]]
        rows = np.zeros(len(references), ROW)
        for name in REFERENCE_DEFAULTS:
            rows[name] = [reference[name] for reference in references]
        rows["best_score"], rows["kept"], rows["num_targets"] = best_score, num_kept, num_targets
        rows["matched"] = count_matches(
            boxes,
            num_kept,
            truths,
            num_truths,
            generalised=self.generalised,
            threshold=self.thresh_iou,
            undefined=0.0 if self.only_first else np.nan,
        )
        self._buffer += rows.tobytes()

    def state(self) -> np.ndarray:
        """All rows as bytes, uint8 (n, 28): a small array to send to other processes."""
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
                f"sentence {rows['sent_id'][1:][clash][0]} was matched twice with different results: "
                "give every sentence to one process, or drop the padding with accelerator.gather_for_metrics"
            )
        rows = rows[np.concatenate([[True], ~repeated])] if len(rows) else rows
        if expected is not None:
            _refuse_gaps(rows["sent_id"], np.fromiter(expected, np.int64))
        return rows

    def compute(self, *, expected: Iterable[int] | None = None) -> dict[str, float]:
        """`F1_score` (also called Pr@F1=1), `T_acc`, `N_acc` and `always_empty/F1_score`, all 0..1; 0.0 of nothing.

        `always_empty/F1_score` is what predicting no box at all would score.
        """
        rows = self.rows(expected)
        correct, none = self.correct(rows), rows["num_targets"] == 0
        return {
            "F1_score": _share(correct),
            "T_acc": _share(rows["kept"][~none] > 0),
            "N_acc": _share(rows["kept"][none] == 0),
            "always_empty/F1_score": _share(none),
        }

    def correct(self, rows: np.ndarray) -> np.ndarray:
        """Whether each sentence is answered rightly: F1 at the threshold, or nothing kept where there is nothing."""
        truths = np.minimum(rows["num_targets"], 1 if self.only_first else np.iinfo(np.int32).max)
        boxes = rows["kept"].astype(np.int64) + truths
        f1 = np.divide(2.0 * rows["matched"], boxes, out=np.zeros(len(rows)), where=boxes > 0)
        return np.where(rows["num_targets"] == 0, rows["kept"] == 0, f1 >= self.thresh_F1)

    def breakdown(self) -> dict[str, dict[str, float]]:
        """`samples`, `F1_score` and `rejected` (share with no box kept) of sentences with 0, 1, 2 or 3+ targets."""
        rows = self.rows()
        targets = np.minimum(rows["num_targets"], 3)
        groups = {f"num_targets={count}{'+' if count == 3 else ''}": rows[targets == count] for count in range(4)}
        return {
            name: {
                "samples": len(group),
                "F1_score": _share(self.correct(group)),
                "rejected": _share(group["kept"] == 0),
            }
            for name, group in groups.items()
            if len(group)
        }

    def intervals(
        self, *, resamples: int = 1000, level: float = 0.95, seed: int = 0
    ) -> dict[str, tuple[float, float]]:
        """Percentile bootstrap of F1_score, T_acc, N_acc: (low, high) each.

        Whole images are drawn, since sentences of one image err together; sentences where image ids are missing.
        """
        rows = self.rows()
        if not len(rows):
            raise ValueError("confidence intervals need at least one sentence")
        none = rows["num_targets"] == 0
        hits = {
            "F1_score": self.correct(rows),
            "T_acc": ~none & (rows["kept"] > 0),
            "N_acc": none & (rows["kept"] == 0),
        }
        known = (rows["image_id"] >= 0).all()
        unit = np.unique(rows["image_id"], return_inverse=True)[1] if known else np.arange(len(rows))
        tallies = np.stack(
            [np.bincount(unit, weights) for weights in (*hits.values(), np.ones(len(rows)), ~none, none)]
        )
        draw, count = np.random.default_rng(seed), tallies.shape[1]
        drawn = [tallies @ np.bincount(draw.integers(count, size=count), minlength=count) for _ in range(resamples)]
        hit, whole = np.split(np.array(drawn), 2, axis=1)
        tails = np.percentile(hit / np.maximum(whole, 1), [50 * (1 - level), 50 * (1 + level)], axis=0)
        return {name: (float(low), float(high)) for name, low, high in zip(hits, *tails)}

    def table(self) -> dict[str, list]:
        """One entry per sentence and column: those of a row, and `correct`."""
        rows = self.rows()
        columns = {name: rows[name].tolist() for name in rows.dtype.names}
        return columns | {"correct": self.correct(rows).tolist()}


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


def join_boxes(parts: Sequence[Sequence]) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of many sentences end to end, float32 (n, 4), and the number of each."""
    arrays = [np.asarray(part, np.float32) for part in parts]
    for index, array in enumerate(arrays):
        if array.size and array.shape[1:] != (4,):
            raise ValueError(f"the boxes of sentence {index} have shape {array.shape}, they should be (n, 4)")
    return _join([array.reshape(-1, 4) for array in arrays], np.zeros((0, 4), np.float32))


def join_scores(parts: Sequence[Sequence]) -> tuple[np.ndarray, np.ndarray]:
    """Scores of many sentences end to end, float32 (n,), and the number of each."""
    return _join([np.asarray(part, np.float32) for part in parts], np.zeros(0, np.float32))


def _join(arrays: Sequence[np.ndarray], empty: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([empty, *arrays]), np.array([len(array) for array in arrays], np.int64)


def _refuse_bad_input(
    number: np.ndarray, score_number: np.ndarray, truths: np.ndarray, num_targets: np.ndarray
) -> None:
    if (wrong := number != score_number).any():
        index = int(np.argmax(wrong))
        raise ValueError(f"prediction {index} has {number[index]} boxes and {score_number[index]} scores")
    if not (good := valid_boxes(truths)).all():
        worst = int(np.argmin(good))
        index = int(np.searchsorted(np.cumsum(num_targets), worst, side="right"))
        raise ValueError(
            f"reference {index} has the box {truths[worst].tolist()}: boxes are x0, y0, x1, y1, pixels, with x0 <= x1 "
            "and y0 <= y1, and a sentence without target has none"
        )


def _refuse_gaps(found: np.ndarray, expected: np.ndarray) -> None:
    missing = np.setdiff1d(expected, found)
    strange = np.setdiff1d(found, expected)
    if len(missing) or len(strange):
        raise ValueError(
            f"of {len(expected)} expected sentences {len(missing)} are missing (first: {missing[:3].tolist()}) and "
            f"{len(strange)} are not expected (first: {strange[:3].tolist()}): right split, all processes merged?"
        )


def _share(hits: np.ndarray) -> float:
    return float(np.count_nonzero(hits) / len(hits)) if len(hits) else 0.0
