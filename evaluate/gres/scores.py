"""From per-sentence rows to scores, with the choices in which published evaluators differ.

A ratio with nothing below the line is 0.0 throughout (the published evaluator crashes or gives nan there), so a set
without sentences scores 0.0 everywhere. Means are summed exactly (`math.fsum`): the order of the rows leaves no trace.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import fsum

import numpy as np

PRECISION_AT = (0.7, 0.8, 0.9)


@dataclass(frozen=True)
class Protocol:
    """What one published evaluator does.

    Attributes:
        resolution: where masks are compared: None as given, "original" the reference's size, int a square.
        threshold: a sentence is answered "none" above this no-target probability; None: when its mask is empty.
        keeps_rejected: whether a wrongly rejected sentence is still scored by its mask, or has no intersection.
        void: IoU of a targeted sentence whose prediction and truth are both empty.
    """

    resolution: int | str | None = None
    threshold: float | None = 0.5
    keeps_rejected: bool = False
    void: float = 0.0


PROTOCOLS = {
    "rela": Protocol(),
    "gsva": Protocol(resolution="original", keeps_rejected=True),
    "lisa": Protocol(resolution="original", threshold=None, keeps_rejected=True, void=1.0),
    "deris": Protocol(resolution=384, threshold=0.3),
    "propvg": Protocol(resolution=320, threshold=0.3),
}


@dataclass(frozen=True)
class Verdicts:
    """One entry per sentence: pixels that count, IoU (0..1), answered "none" or not, and rightly so or not."""

    intersection: np.ndarray
    union: np.ndarray
    iou: np.ndarray
    rejected: np.ndarray
    no_target: np.ndarray

    def __getitem__(self, index: np.ndarray) -> Verdicts:
        return Verdicts(*(values[index] for values in vars(self).values()))


def judge(rows: np.ndarray, protocol: Protocol, threshold: float | None = None) -> Verdicts:
    """Apply a protocol to rows; `threshold` replaces the protocol's own."""
    threshold = protocol.threshold if threshold is None else threshold
    no_target = rows["no_target"]
    rejected = rows["predicted"] == 0 if threshold is None else rows["no_target_score"] > threshold
    scored = ~no_target & (~rejected | protocol.keeps_rejected)
    intersection = np.where(scored, rows["intersection"], 0).astype(np.int64)
    union = np.where(no_target & rejected, 0, rows["union"]).astype(np.int64)
    iou = np.divide(intersection, union, out=np.full(len(rows), protocol.void), where=union > 0)
    iou[no_target] = rejected[no_target]
    return Verdicts(intersection, union, iou, rejected, no_target)


def headline(rows: np.ndarray, protocol: Protocol, threshold: float | None = None) -> dict[str, float]:
    """The published scores of all rows, then of each source (`refcoco/gIoU`, ...) when there are several.

    gIoU, cIoU and Pr@X are 0..100, T_acc and N_acc 0..1, as published; `always_empty/gIoU` is what answering "none"
    to everything would score.
    """
    verdicts = judge(rows, protocol, threshold)
    result = published(verdicts)
    result["always_empty/gIoU"] = 100 * ratio(np.count_nonzero(verdicts.no_target), len(rows))
    sources = np.unique(rows["source"])
    for source in sources if len(sources) > 1 else ():
        part = published(verdicts[rows["source"] == source])
        result |= {f"{source.decode() or 'unnamed'}/{key}": value for key, value in part.items()}
    return result


def published(verdicts: Verdicts) -> dict[str, float]:
    """gIoU, cIoU, T_acc, N_acc and Pr@0.7, 0.8, 0.9 with the definitions of ReLA's evaluator (CVPR 2023)."""
    targeted = ~verdicts.no_target
    empty = np.count_nonzero(verdicts.no_target)
    kept = np.count_nonzero(targeted & ~verdicts.rejected)
    found = np.count_nonzero(verdicts.no_target & verdicts.rejected)
    result = {
        "gIoU": 100 * ratio(fsum(verdicts.iou), len(verdicts.iou)),
        "cIoU": 100 * ratio(int(verdicts.intersection.sum()), int(verdicts.union.sum())),
        # the published evaluator reports both as 0 for a set without no-target sentences
        "T_acc": ratio(kept, np.count_nonzero(targeted)) if empty else 0.0,
        "N_acc": ratio(found, empty),
    }
    for level in PRECISION_AT:
        precise = np.count_nonzero(verdicts.iou[targeted] >= level)
        result[f"Pr@{level}"] = 100 * ratio(precise, np.count_nonzero(targeted))
    return result


def ratio(part: float, whole: float) -> float:
    """part / whole, and 0.0 of nothing."""
    return float(part / whole) if whole else 0.0
