"""Beyond the headline: groups of sentences, confidence intervals, the no-target operating curve, a table of errors.

Every function takes the rows and the protocol of a `GresAccumulator`, which offers them as methods.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import fsum
from pathlib import Path

import numpy as np

from .scores import PRECISION_AT, Protocol, Verdicts, judge, ratio

WORD_BINS = ("1-2", 1, 2), ("3-4", 3, 4), ("5-8", 5, 8), ("9+", 9, 255)
SIZE_BINS = ("<1%", 0.0, 0.01), ("=1-10%", 0.01, 0.1), (">=10%", 0.1, np.inf)


@dataclass(frozen=True)
class Threshold:
    """A no-target threshold (0..1) with the sentences it was chosen on, which therefore cannot be reported."""

    value: float
    sent_ids: frozenset[int]

    def for_rows(self, rows: np.ndarray) -> float:
        """The value, if it is honest to use on these rows; ValueError if it was chosen on any of them."""
        if (rows["sent_id"] < 0).any():
            raise ValueError(
                "a chosen threshold needs the sent_id of every reference, to prove that they were held out"
            )
        if seen := self.sent_ids.intersection(rows["sent_id"].tolist()):
            raise ValueError(
                f"the threshold {self.value:.4f} was chosen on {len(seen)} of the {len(rows)} sentences reported "
                f"(first: {min(seen)}): choose it on a part of train that the model was not trained on"
            )
        return self.value


def breakdown(rows: np.ndarray, protocol: Protocol, threshold: float | None = None) -> dict[str, dict[str, float]]:
    """Scores of groups of sentences: `targeted`, by number of targets, by share of the image, by number of words.

    Each has `samples`, `gIoU` and `cIoU` (0..100) and `rejected`, the share (0..1) answered "none". A group
    that is empty, or of which the references say nothing, is left out.
    """
    verdicts = judge(rows, protocol, threshold)
    targeted = ~rows["no_target"]
    targets = np.where(rows["no_target"], 0, rows["num_targets"])
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
    rows: np.ndarray,
    protocol: Protocol,
    threshold: float | None = None,
    *,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> dict[str, tuple[float, float]]:
    """Percentile bootstrap of the headline scores: (low, high) each, in the headline's units.

    Whole images are drawn, since sentences of one image err together; single sentences where image ids are missing.
    """
    if not len(rows):
        raise ValueError("confidence intervals need at least one sentence")
    verdicts = judge(rows, protocol, threshold)
    known = (rows["image_id"] >= 0).all()
    _, unit = np.unique(rows["image_id"], return_inverse=True) if known else (None, np.arange(len(rows)))
    tallies = _tallies(verdicts)
    sums = np.stack([np.bincount(unit, weights) for weights in tallies.values()])
    draw = np.random.default_rng(seed)
    count = sums.shape[1]
    drawn = [sums @ np.bincount(draw.integers(count, size=count), minlength=count) for _ in range(resamples)]
    total = dict(zip(tallies, np.stack(drawn, axis=1)))
    pairs = {"gIoU": ("iou", "one", 100), "cIoU": ("intersection", "union", 100)}
    pairs |= {"T_acc": ("kept", "targeted", 1), "N_acc": ("found", "no_target", 1)}
    pairs |= {f"Pr@{at}": (f"Pr@{at}", "targeted", 100) for at in PRECISION_AT}
    tails = [50 * (1 - level), 50 * (1 + level)]
    values = {name: scale * total[part] / np.maximum(total[whole], 1) for name, (part, whole, scale) in pairs.items()}
    return {name: tuple(np.percentile(value, tails).tolist()) for name, value in values.items()}


def _tallies(verdicts: Verdicts) -> dict[str, np.ndarray]:
    targeted = ~verdicts.no_target
    tallies = {
        "one": np.ones(len(targeted)),
        "iou": verdicts.iou,
        "intersection": verdicts.intersection,
        "union": verdicts.union,
        "targeted": targeted,
        "kept": targeted & ~verdicts.rejected,
        "no_target": verdicts.no_target,
        "found": verdicts.no_target & verdicts.rejected,
    }
    return tallies | {f"Pr@{at}": targeted & (verdicts.iou >= at) for at in PRECISION_AT}


def curve(rows: np.ndarray, protocol: Protocol) -> dict[str, np.ndarray]:
    """What every no-target threshold would give: arrays `threshold`, `N_acc`, `T_acc` (0..1), `gIoU`, `cIoU` (0..100).

    Thresholds ascend through 0 and all predicted probabilities; sentences above one are rejected.
    """
    if protocol.threshold is None:
        raise ValueError("this protocol decides by the mask alone: there is no threshold to vary")
    order = np.argsort(rows["no_target_score"], kind="stable")
    rows = rows[order]
    threshold = np.unique(np.concatenate([[0.0], rows["no_target_score"]]))
    accepted = np.searchsorted(rows["no_target_score"], threshold, side="right")
    never, always = _tallies(judge(rows, protocol, 1.0)), _tallies(judge(rows, protocol, -1.0))
    total = {name: _prefix(never[name])[accepted] + _suffix(always[name])[accepted] for name in never}
    parts = ("N_acc", "found", "no_target", 1), ("T_acc", "kept", "targeted", 1)
    parts += ("gIoU", "iou", "one", 100), ("cIoU", "intersection", "union", 100)
    points = {name: scale * total[part] / np.maximum(total[whole], 1) for name, part, whole, scale in parts}
    return {"threshold": threshold, **points}


def _prefix(values: np.ndarray) -> np.ndarray:
    return np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])


def _suffix(values: np.ndarray) -> np.ndarray:
    return _prefix(values[::-1])[::-1]


def choose_threshold(rows: np.ndarray, protocol: Protocol, by: str = "gIoU") -> Threshold:
    """The threshold that is best on held-out sentences, to be used on others.

    Args:
        by: "gIoU", or "balanced" for the mean of N_acc and T_acc, which does not depend on how many sentences refer to
            nothing (9 % of train, 63 % of val).

    Of equally good thresholds the one nearest 0.5 is taken, half-way to the next probability.
    """
    if not len(rows) or (rows["sent_id"] < 0).any():
        raise ValueError("choosing a threshold needs held-out sentences, each with its sent_id")
    points = curve(rows, protocol)
    goals = {"gIoU": points["gIoU"], "balanced": points["N_acc"] + points["T_acc"]}
    if by not in goals:
        raise ValueError(f"by={by!r} is none of {', '.join(goals)}")
    middle = (points["threshold"] + np.append(points["threshold"][1:], 1.0)) / 2
    best = np.flatnonzero(goals[by] >= goals[by].max() - 1e-9)
    value = middle[best[np.argmin(np.abs(middle[best] - 0.5))]]
    return Threshold(float(value), frozenset(rows["sent_id"].tolist()))


def plot_curve(points: dict[str, np.ndarray], path: str | Path) -> None:
    """Draw a `curve`: N_acc against T_acc, and gIoU over the threshold, into a picture file. Needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    trade, score = figure.subplots(1, 2)
    trade.plot(points["T_acc"], points["N_acc"])
    trade.set(xlabel="T_acc", ylabel="N_acc", xlim=(0, 1.02), ylim=(0, 1.02), title="rejecting rightly and wrongly")
    for name in ("gIoU", "cIoU"):
        score.plot(points["threshold"], points[name], label=name)
    score.set(xlabel="no-target threshold", ylim=(0, 102), title="scores over the threshold")
    score.legend()
    figure.savefig(path)


def table(rows: np.ndarray, protocol: Protocol, threshold: float | None = None) -> dict[str, list]:
    """One entry per sentence and column, for `datasets.Dataset.from_dict` or `pandas.DataFrame`.

    The columns of a row (areas in pixels, before rejection), and the verdict: `rejected`, `iou` (0..1).
    """
    verdicts = judge(rows, protocol, threshold)
    columns = {name: rows[name].tolist() for name in rows.dtype.names}
    columns["source"] = [source.decode() for source in columns["source"]]
    return columns | {"rejected": verdicts.rejected.tolist(), "iou": verdicts.iou.tolist()}
