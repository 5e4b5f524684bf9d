"""Per-sentence results of matched boxes, 40 bytes a sentence, and their scores, in any order and process."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

import numpy as np

from .boxes import join_boxes, join_scores, ranked_scores, refuse_bad_boxes
from .matching import count_matches
from .modes import MODES
from .sentence_rows import (
    SentenceRows,
    Threshold,
    best_threshold,
    bootstrap,
    choice,
    number,
    ratio,
    read_columns,
    refuse_anonymous,
    whole_numbers,
)

ROW = np.dtype(
    [
        ("sent_id", "<i8"),  # -1: anonymous
        ("image_id", "<i8"),  # -1: unknown
        ("best_score", "<f4"),  # of all predictions, -inf without any
        ("matched", "<i4"),
        ("kept", "<i4"),  # predictions at or above the score threshold
        ("num_targets", "<i4"),
        # with thresh_F1=1 a sentence is correct where the score threshold lies between these two; never: both -inf
        ("correct_above", "<f4"),
        ("correct_up_to", "<f4"),
    ]
)
OPTIONAL = {"sent_id": -1, "image_id": -1}


class GrecAccumulator(SentenceRows):
    """Constant memory per sentence; the scores are the same for any order of sentences and number of processes.

    Args:
        thresh_score: predictions scoring below are dropped; scores are float32, so a float32 0.7 is below 0.7. A
            `Threshold` of `choose_threshold` is refused where it was chosen on a sentence that is scored.
        thresh_iou: least overlap of a matched pair.
        thresh_F1: least F1 of a sentence that counts as correct.
        iou: "giou", generalised IoU as the published code has it, or "iou", as the paper words it; by default what
            `compat` does.
        compat: whose evaluator to follow, a key of `MODES`.
        batch_size: for the modes that score batch by batch ("simvg"): sentences of a batch, by default theirs.
    """

    row: ClassVar[np.dtype] = ROW
    verb: ClassVar[str] = "matched"

    def __init__(
        self,
        *,
        thresh_score: float | Threshold = 0.7,
        thresh_iou: float = 0.5,
        thresh_F1: float = 1.0,
        iou: str | None = None,
        compat: str = "published",
        batch_size: int | None = None,
    ) -> None:
        super().__init__()
        self.mode = MODES[choice("compat", compat, MODES)]
        if iou is not None:
            choice("iou", iou, ("giou", "iou"))
            if self.mode.only_first and iou != "iou":
                raise ValueError(f"iou={iou!r} with compat={compat!r}, which compares by plain IoU: leave one out")
        if batch_size is not None:
            if self.mode.batch_size is None:
                raise ValueError(f"batch_size={batch_size!r} with compat={compat!r}, which does not score batches")
            if not isinstance(batch_size, (int, np.integer)) or isinstance(batch_size, bool) or batch_size < 1:
                raise ValueError(f"batch_size={batch_size!r}: give a whole number of sentences from 1")
        self.compat, self.batch_size = compat, batch_size or self.mode.batch_size
        self.thresh_score = thresh_score
        number("thresh_score", self._score)
        self.thresh_iou, self.thresh_F1 = number("thresh_iou", thresh_iou), number("thresh_F1", thresh_F1)
        self.generalised = (iou or self.mode.iou) == "giou"

    @property
    def _score(self) -> float:
        return self.thresh_score.value if isinstance(self.thresh_score, Threshold) else self.thresh_score

    def add_batch(self, *, predictions: Sequence[Mapping], references: Sequence[Mapping]) -> None:
        """Add sentences, each with any number of boxes (lists, arrays or CPU tensors), pixels x0, y0, x1, y1.

        Args:
            predictions: `boxes` (n, 4) and `scores` (n,) before any threshold. A box with nan, infinite or exchanged
                corners matches nothing, but is a prediction; a nan score is below any threshold.
            references: `boxes` (m, 4), none where the sentence refers to nothing; optionally `sent_id`, `image_id`.

        Raises:
            ValueError: boxes and scores differ in number, a true box has nan, infinite or exchanged corners, or a box
                is so large that its area overflows.
        """
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
        answers = read_columns(predictions, "prediction", ["boxes", "scores"])
        given = read_columns(references, "reference", ["boxes"], OPTIONAL)
        boxes, num_boxes = join_boxes(answers["boxes"], "prediction")
        scores, num_scores = join_scores(answers["scores"])
        truths, num_targets = join_boxes(given.pop("boxes"), "reference")
        refuse_bad_boxes(boxes, num_boxes, num_scores, truths, num_targets)
        columns = {name: whole_numbers(name, values, ROW[name]) for name, values in given.items()}
        columns["num_targets"] = num_targets
        columns |= self._match(boxes, scores, num_boxes, truths, num_targets)
        self._append(len(references), columns)

    def _match(
        self,
        boxes: np.ndarray,
        scores: np.ndarray,
        num_boxes: np.ndarray,
        truths: np.ndarray,
        num_targets: np.ndarray,
    ) -> dict[str, np.ndarray]:
        """The columns of the rows that say what is kept and matched."""
        if self.mode.only_first:
            truths = truths[(np.cumsum(num_targets) - num_targets)[num_targets > 0]]
            num_targets = np.minimum(num_targets, 1)
        scores = np.where(np.isnan(scores), np.float32(-np.inf), scores)
        best, last, following = ranked_scores(scores, num_boxes, num_targets)
        is_kept = self._keeps(scores, self._score)
        num_kept, matched = self._count(is_kept, boxes, scores, num_boxes, truths, num_targets)
        # F1 is 1 only where as many boxes are kept as there are targets: those that score best, if no two tie there
        exact = (last > following) & (num_targets > 0)
        other = exact & (num_kept != num_targets)
        sentence = np.repeat(np.arange(len(num_boxes)), num_boxes)
        of_targets = (scores >= last[sentence]) & other[sentence]
        _, matched_targets = self._count(of_targets, boxes, scores, num_boxes, truths, num_targets)
        all_match = np.where(other, matched_targets, matched) == num_targets
        correct = np.where(num_targets > 0, exact & all_match, True)
        infinite = np.float32(np.inf)
        return {
            "best_score": best,
            "kept": num_kept,
            "matched": matched,
            "correct_above": np.where(correct, np.where(num_targets > 0, following, best), -infinite),
            "correct_up_to": np.where(correct, np.where(num_targets > 0, last, infinite), -infinite),
        }

    def _keeps(self, scores: np.ndarray, threshold: float | np.ndarray) -> np.ndarray:
        """Whether predictions with these float32 scores are kept at a threshold."""
        threshold = np.asarray(threshold, np.float32 if self.mode.float32 else np.float64)
        return scores > threshold if self.mode.strict else scores >= threshold

    def _count(
        self,
        chosen: np.ndarray,
        boxes: np.ndarray,
        scores: np.ndarray,
        num_boxes: np.ndarray,
        truths: np.ndarray,
        num_targets: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        """How many of the chosen predictions each sentence has, and how many of them match, int64 (n,) each."""
        sentence = np.repeat(np.arange(len(num_boxes)), num_boxes)[chosen]
        boxes, scores = boxes[chosen], scores[chosen]
        # the published evaluator sorts by score, then by box: it decides which of equal pairs is taken
        boxes = boxes[np.lexsort((*-boxes.T[::-1], -scores, sentence))]
        num_chosen = np.bincount(sentence, minlength=len(num_boxes))
        matched = count_matches(
            boxes,
            num_chosen,
            truths,
            num_targets,
            generalised=self.generalised,
            threshold=self.thresh_iou,
            undefined=0.0 if self.mode.only_first else np.nan,
        )
        return num_chosen, matched

    def compute(
        self, *, threshold: float | Threshold | None = None, expected: Iterable[int] | None = None
    ) -> dict[str, float]:
        """`F1_score` (also called Pr@F1=1), `T_acc`, `N_acc` and `always_empty/F1_score`, all 0..1; 0.0 of nothing.

        `always_empty/F1_score` is what predicting no box at all would score.

        Args:
            threshold: of the score, in place of `thresh_score`.
            expected: see `rows`.
        """
        rows = self.rows(expected)
        hits, targeted = self._tallies(rows, threshold), rows["num_targets"] > 0
        if self.batch_size is None:
            sums = {name: np.count_nonzero(values) for name, values in hits.items()}
            return {name: float(value) for name, value in self._scores(sums).items()} | {
                "always_empty/F1_score": float(ratio(np.count_nonzero(~targeted), len(rows)))
            }
        return self._batch_means(self.arrived_rows(), threshold)

    def _batch_means(self, rows: np.ndarray, threshold: float | Threshold | None) -> dict[str, float]:
        """Means of the scores of batches, in the order in which sentences were added."""
        first = np.arange(0, len(rows), self.batch_size)
        hits = self._tallies(rows, threshold)
        sums = {name: np.add.reduceat(values, first, dtype=np.int64) for name, values in hits.items() if len(rows)}
        if not len(rows):
            return dict.fromkeys(("F1_score", "N_acc", "always_empty/F1_score"), 0.0)
        scores = self._scores(sums) | {"always_empty/F1_score": ratio(sums["no_target"], sums["sentences"])}
        return {name: float(np.mean(values)) for name, values in scores.items() if name != "T_acc"}

    @staticmethod
    def _scores(sums: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        pairs = {"F1_score": "sentences", "T_acc": "targeted", "N_acc": "no_target"}
        return {name: ratio(sums[name], sums[whole]) for name, whole in pairs.items()}

    def _tallies(self, rows: np.ndarray, threshold: float | Threshold | None = None) -> dict[str, np.ndarray]:
        """What each sentence adds to the sums of which scores are made, bool (n,) each."""
        value = self._value(threshold, rows)
        no_target = rows["num_targets"] == 0
        any_kept = self._keeps(rows["best_score"], value)
        return {
            "F1_score": self.correct(rows, value),
            "T_acc": ~no_target & any_kept,
            "N_acc": no_target & ~any_kept,
            "sentences": np.ones(len(rows), bool),
            "targeted": ~no_target,
            "no_target": no_target,
        }

    def _value(self, threshold: float | Threshold | None, rows: np.ndarray) -> float:
        threshold = self.thresh_score if threshold is None else threshold
        return threshold.for_rows(rows) if isinstance(threshold, Threshold) else number("threshold", threshold)

    def correct(self, rows: np.ndarray, threshold: float | None = None) -> np.ndarray:
        """Whether each sentence is answered correctly: F1 at `thresh_F1`, or no box kept where there is no target."""
        if threshold is not None and threshold != self._score:
            self._refuse_other_f1()
            above = self._keeps(rows["correct_up_to"], threshold)
            return above & ~self._keeps(rows["correct_above"], threshold)
        num_targets = np.minimum(rows["num_targets"], 1) if self.mode.only_first else rows["num_targets"]
        boxes = rows["kept"].astype(np.int64) + num_targets
        f1 = ratio(2.0 * rows["matched"], boxes)
        return np.where(rows["num_targets"] == 0, rows["kept"] == 0, f1 >= self.thresh_F1)

    def _refuse_other_f1(self) -> None:
        if self.thresh_F1 != 1:
            raise ValueError(
                f"thresh_F1={self.thresh_F1}: other score thresholds than that of the accumulator need thresh_F1=1"
            )

    def _refuse_batches(self, what: str) -> None:
        if self.batch_size is not None:
            raise ValueError(f'compat={self.compat!r} is a mean over batches, without {what}: use compat="published"')

    def breakdown(self, threshold: float | Threshold | None = None) -> dict[str, dict[str, float]]:
        """`samples`, `F1_score` and `rejected` (share with no box kept) of sentences with 0, 1, 2 or 3+ targets."""
        self._refuse_batches("groups")
        rows = self.rows()
        value = self._value(threshold, rows)
        targets = np.minimum(rows["num_targets"], 3)
        groups = {f"num_targets={count}{'+' if count == 3 else ''}": rows[targets == count] for count in range(4)}
        return {
            name: {
                "samples": len(group),
                "F1_score": float(np.mean(self.correct(group, value))),
                "rejected": float(np.mean(~self._keeps(group["best_score"], value))),
            }
            for name, group in groups.items()
            if len(group)
        }

    def intervals(
        self, threshold: float | Threshold | None = None, **options: float
    ) -> dict[str, tuple[float, float]]:
        """Percentile bootstrap of F1_score, T_acc, N_acc over images: (low, high) each.

        Options are `resamples` (1000), `level` (0.95) and `seed` (0); see `bootstrap`.
        """
        self._refuse_batches("intervals")
        rows = self.rows()
        return bootstrap(self._tallies(rows, threshold), rows["image_id"], self._scores, **options)

    def table(self, threshold: float | Threshold | None = None) -> dict[str, list]:
        """One entry per sentence and column: those of a row, and `correct`."""
        rows = self.rows()
        columns = {name: rows[name].tolist() for name in rows.dtype.names}
        return columns | {"correct": self.correct(rows, self._value(threshold, rows)).tolist()}

    def curve(self, thresholds: Sequence[float] | None = None) -> dict[str, np.ndarray]:
        """What every score threshold would give: arrays `threshold`, `F1_score`, `T_acc`, `N_acc` (0..1).

        Args:
            thresholds: where; by default 0 and all scores at which a sentence's answer changes, ascending.
        """
        self._refuse_batches("operating curve")
        self._refuse_other_f1()
        rows = self.rows()
        ends = np.concatenate([rows[name] for name in ("best_score", "correct_above", "correct_up_to")])
        if thresholds is None:
            thresholds = np.append(0.0, ends[np.isfinite(ends)].astype(np.float64))
        else:
            thresholds = [number("thresholds", threshold) for threshold in thresholds]
        at = np.unique(thresholds)
        no_target = rows["num_targets"] == 0
        correct = self._num_kept(rows["correct_up_to"], at) - self._num_kept(rows["correct_above"], at)
        best = {name: rows["best_score"][part] for name, part in (("T_acc", ~no_target), ("N_acc", no_target))}
        return {
            "threshold": at,
            "F1_score": ratio(correct, len(rows)),
            "T_acc": ratio(self._num_kept(best["T_acc"], at), len(best["T_acc"])),
            "N_acc": ratio(len(best["N_acc"]) - self._num_kept(best["N_acc"], at), len(best["N_acc"])),
        }

    def _num_kept(self, scores: np.ndarray, thresholds: np.ndarray) -> np.ndarray:
        """How many of these scores are kept at each threshold, int64."""
        kind = np.float32 if self.mode.float32 else np.float64
        side = "right" if self.mode.strict else "left"
        return len(scores) - np.searchsorted(np.sort(scores).astype(kind), thresholds.astype(kind), side=side)

    def choose_threshold(self, by: str = "F1_score") -> Threshold:
        """The score threshold that is best on held-out sentences, to be used on others.

        Args:
            by: "F1_score", or "balanced" for the mean of N_acc and T_acc, which does not depend on how many sentences
                refer to nothing (9 % of train, 63 % of val).

        Of equally good thresholds the one nearest `thresh_score` is taken, half-way to the next score.
        """
        refuse_anonymous(self.rows())
        points = self.curve()
        goals = {"F1_score": points["F1_score"], "balanced": points["N_acc"] + points["T_acc"]}
        # a point of the curve holds down to the score below it, or with a strict comparison up to the score above
        at = points["threshold"]
        neighbour = np.append(at[1:], at[-1]) if self.mode.strict else np.append(at[0], at[:-1])
        return best_threshold(goals, by, (at + neighbour) / 2, self._score, self.rows())
