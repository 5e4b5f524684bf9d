"""Beyond the headline: groups of sentences, confidence intervals, the no-target operating curve, a table of errors.

Every function takes the rows and the mode of a `GresAccumulator`, which offers them as methods.
"""

from __future__ import annotations

from math import fsum

import numpy as np

from .scores import Mode, Verdicts, judge, scores_of, tallies
from .sentence_rows import Threshold, best_threshold, bootstrap, ratio, refuse_anonymous

WORD_BINS = ("1-2", 1, 2), ("3-4", 3, 4), ("5-8", 5, 8), ("9+", 9, 255)
SIZE_BINS = ("<1%", 0.0, 0.01), ("=1-10%", 0.01, 0.1), (">=10%", 0.1, np.inf)


def breakdown(rows: np.ndarray, mode: Mode, threshold: float | None = None) -> dict[str, dict[str, float]]:
    """Scores of groups of sentences: `targeted`, by number of targets, by share of the image, by number of words.

    Each has `samples`, `gIoU` and `cIoU` (0..100) and `rejected`, the share (0..1) answered "none". A group
    that is empty, or of which the references say nothing, is not given.
    """
    verdicts = judge(rows, mode, threshold)
    targeted = ~verdicts.no_target
    targets = np.where(targeted, rows["num_targets"], 0)
    truth = rows["union"].astype(np.int64) - rows["predicted"] + rows["intersection"]
    share = np.divide(truth, rows["pixels"], out=np.full(len(rows), -1.0), where=(rows["pixels"] > 0) & targeted)
    groups = {"targeted": targeted}
    groups |= {f"num_targets={count}": targets == count for count in (0, 1, 2)} | {"num_targets=3+": targets >= 3}
    groups |= {f"mask_size{name}": (share >= low) & (share < high) for name, low, high in SIZE_BINS}
    words = rows["num_words"]
    groups |= {f"num_words={name}": (words >= low) & (words <= high) for name, low, high in WORD_BINS}
    return {name: _summary(verdicts[chosen]) for name, chosen in groups.items() if chosen.any()}


def _summary(verdicts: Verdicts) -> dict[str, float]:
    samples = len(verdicts.iou)
    return {
        "samples": samples,
        "gIoU": 100 * ratio(fsum(verdicts.iou), samples),
        "cIoU": 100 * ratio(int(verdicts.intersection.sum()), int(verdicts.union.sum())),
        "rejected": ratio(np.count_nonzero(verdicts.rejected), samples),
    }


def intervals(
    rows: np.ndarray, mode: Mode, threshold: float | None = None, **options: float
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap of the headline scores over images: (low, high) each, in the headline's units.

    Options are `resamples` (1000), `level` (0.95) and `seed` (0); see `bootstrap`.
    """
    verdicts = judge(rows, mode, threshold)
    any_no_target = bool(verdicts.no_target.any())
    return bootstrap(
        tallies(verdicts), rows["image_id"], lambda total: scores_of(total, mode, any_no_target), **options
    )


def curve(rows: np.ndarray, mode: Mode) -> dict[str, np.ndarray]:
    """What every no-target threshold would give: arrays `threshold`, `N_acc`, `T_acc` (0..1), `gIoU`, `cIoU` (0..100).

    Thresholds ascend through 0 and all predicted probabilities.
    """
    if mode.none_rule not in ("flag", "query"):
        raise ValueError("this mode decides by the mask alone: there is no threshold to vary")
    rows = rows[np.argsort(mode.score_key(rows["no_target_score"]), kind="stable")]
    threshold = np.unique(np.concatenate([[0.0], rows["no_target_score"]]))
    # sentences below the threshold are accepted; one at it is accepted too, but not by the rule of queries
    side = "left" if mode.none_rule == "query" else "right"
    scores = mode.score_key(rows["no_target_score"])
    num_accepted = np.searchsorted(scores, mode.score_key(threshold), side=side)
    accepted, rejected = (tallies(judge(rows, mode, rejected=np.full(len(rows), answer))) for answer in (False, True))
    total = {name: _prefix(accepted[name])[num_accepted] + _suffix(rejected[name])[num_accepted] for name in accepted}
    points = scores_of(total, mode, bool(accepted["no_target"].any()))
    return {"threshold": threshold} | {name: points[name] for name in ("N_acc", "T_acc", "gIoU", "cIoU")}


def _prefix(values: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])


def _suffix(values: np.ndarray) -> np.ndarray:
    return _prefix(values[::-1])[::-1]


def choose_threshold(rows: np.ndarray, mode: Mode, by: str = "gIoU") -> Threshold:
    """The threshold that is best on held-out sentences, to be used on others.

    Args:
        by: "gIoU", or "balanced" for the mean of N_acc and T_acc, which does not depend on how many sentences refer to
            nothing (9 % of train, 63 % of val).

    Of equally good thresholds the one nearest 0.5 is taken, half-way to the next probability.
    """
    refuse_anonymous(rows)
    points = curve(rows, mode)
    goals = {"gIoU": points["gIoU"], "balanced": points["N_acc"] + points["T_acc"]}
    # a point of the curve holds up to the next probability; by the rule of queries, down to the one before
    at = points["threshold"]
    neighbour = np.append(0.0, at[:-1]) if mode.none_rule == "query" else np.append(at[1:], 1.0)
    return best_threshold(goals, by, (at + neighbour) / 2, 0.5, rows)


def table(rows: np.ndarray, mode: Mode, threshold: float | None = None) -> dict[str, list]:
    """One entry per sentence and column, for `datasets.Dataset.from_dict` or `pandas.DataFrame`.

    The columns of a row (areas in pixels, before rejection), and the verdict: `rejected`, `iou` (0..1).
    """
    verdicts = judge(rows, mode, threshold)
    columns = {name: rows[name].tolist() for name in rows.dtype.names}
    columns["source"] = [source.decode() for source in columns["source"]]
    return columns | {"rejected": verdicts.rejected.tolist(), "iou": verdicts.iou.tolist()}
