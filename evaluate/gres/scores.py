"""From rows of sentences to scores, with the choices in which published evaluators differ.

A ratio with nothing below the line is 0.0 throughout (the published evaluator crashes or gives nan there), so a set
without sentences scores 0.0 everywhere. Means are summed exactly (`math.fsum`): the order of the rows has no effect.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import fsum

import numpy as np

from .sentence_rows import markdown_table, ratio

PRECISION_AT = (0.7, 0.8, 0.9)
IOU_RULES = {
    "no intersection": "I = 0, U = union",
    "by mask": "scored by its mask",
    "not counted": "IoU 0, nothing to I and U",
}
NONE_RULES = {
    "flag": "`no_target` > {0:g}",
    "query": "1 - `no_target`, the best query score, <= {1:g}",
    "mask": "the mask is empty",
    "no answer": "the mask is empty; without an answer (`no_target` > {0:g}) IoU is 0 everywhere",
}


@dataclass(frozen=True)
class Mode:
    """What one published evaluator does. A new mode of `compat` is one entry in `MODES`.

    Attributes:
        source: repository, commit and lines of the evaluator, or of several that do the same.
        resolution: where masks are compared: None as given, "original" the reference's size, int a square.
        nearest: the pixel that a resized mask takes, "center" or "corner".
        none_rule: how a sentence is answered "none", a key of `NONE_RULES`.
        threshold: of the no-target probability, for the rules "flag", "query" and "no answer".
        truth_by_mask: whether a sentence has no target because its true mask is empty, or because its flag says so.
        rejected_target: a target that is answered "none", a key of `IOU_RULES`.
        empty_iou: IoU of a sentence with a target whose prediction and truth are both empty.
        only_targets: whether sentences without target are dropped.
        accuracies: "recall", or "mabp" for the formulas of MABP.
        extra: whether CoHD's `F_2` and `N+T_acc` are given too.
        unit, printed: what one sample is, and how the evaluator prints its scores; for the card.
        comparable: whether the scores can be compared with those published for ReLA; for the card.
    """

    source: str
    resolution: int | str | None = None
    nearest: str = "center"
    none_rule: str = "flag"
    threshold: float | None = 0.5
    truth_by_mask: bool = False
    rejected_target: str = "no intersection"
    empty_iou: float = 0.0
    only_targets: bool = False
    accuracies: str = "recall"
    extra: bool = False
    unit: str = "sentence"
    printed: str = "IoU percent, accuracies fraction"
    comparable: str = "yes"

    def rejects(self, no_target_score: np.ndarray, predicted: np.ndarray, threshold: float | None) -> np.ndarray:
        """Which sentences are answered "none", bool (n,)."""
        if self.none_rule == "mask":
            return predicted == 0
        key, limit = (
            self.score_key(no_target_score),
            self.score_key(self.threshold if threshold is None else threshold),
        )
        if self.none_rule == "query":
            return key >= limit
        return (key > limit) | ((predicted == 0) & (self.none_rule == "no answer"))

    def score_key(self, no_target_score: np.ndarray | float) -> np.ndarray:
        """What a threshold compares: the probability, or the best query score, which is float32, as a negative."""
        score = np.asarray(no_target_score, np.float64)
        return -(1 - score).astype(np.float32) if self.none_rule == "query" else score


RELA = Mode("henghuiding/ReLA@3ca9551 gres_model/evaluation/refer_evaluation.py:14-232")
LISA = Mode(
    "dvlab-research/LISA@3cb2d43 train_ds.py:523-577; "
    "bytedance/Sa2VA@9832e1a projects/sa2va/evaluation/dataset/RES.py:218-285, also SAMTok; "
    "mc-lan/Text4Seg@d6540b6 ms-swift/text4seg/eval_refer_seg.py:14-102",
    resolution="original",
    none_rule="mask",
    threshold=None,
    truth_by_mask=True,
    rejected_target="by mask",
    empty_iou=1.0,
    printed="fraction (SAMTok percent)",
    comparable="no: other size, no head, N_acc and T_acc only in SAMTok",
)
QUERIES = Mode(
    "Dmmm1997/DeRIS@2406687 deris/evaluations/grefcoco.py:59-160",
    resolution=384,
    nearest="corner",
    none_rule="query",
    threshold=0.3,
    printed="percent",
    comparable="almost: another size of masks, sampled at corners",
)
MODES = {
    "rela": RELA,
    "gsva": Mode(
        "LeapLabTHU/GSVA@618dc79 solver.py:221-320; jcwang0602/MLLMSeg@a8fceda mllmseg/test_mllmseg_gres.py:145-247",
        resolution="original",
        truth_by_mask=True,
        rejected_target="by mask",
        printed="fraction (MLLMSeg percent)",
        comparable="no: other size, a rejected target keeps its IoU",
    ),
    "lisa": LISA,
    "deris": QUERIES,
    "propvg": replace(QUERIES, source="Dmmm1997/PropVG@c566fc2 propvg/evaluations/grefcoco.py:59-160", resolution=320),
    "instancevg": replace(
        QUERIES, source="Dmmm1997/InstanceVG@49fd8fa instancevg/evaluations/grefcoco.py:59-160", resolution=320
    ),
    "cohd": replace(
        RELA, source="RobertLuo1/CoHD@9cbd706 gres_model/evaluation/refer_evaluation.py:14-310", extra=True
    ),
    "mabp": replace(
        RELA,
        source="buptLwz/MABP@ec810ea gres_model/evaluation/refer_evaluation.py:14-235",
        accuracies="mabp",
        comparable="IoU yes; T_acc NO: a precision of rejections, TP / (TP + FP + 1); N_acc: TP / (TP + FN + 1)",
    ),
    "psalm": replace(
        LISA,
        source="zamling/PSALM@d5dbfda psalm/eval/eval_grefcoco.py:141-188",
        unit="ref: all its sentences are one prompt, give one row per ref",
        printed="fraction",
        comparable="no: unit, size, no rejection",
    ),
    "xsam": replace(
        LISA,
        source="wanghao9610/X-SAM@2e76946 xsam/xsam/evaluation/evaluators/img_refseg_evaluator.py:93-125",
        only_targets=True,
        printed="percent",
        comparable="no: sentences without target are dropped",
    ),
    "lira": replace(
        LISA,
        source="echo840/LIRA@d5b9c6a omg_llava/tools/refcoco_lira.py:590-736",
        none_rule="no answer",
        threshold=0.5,
        rejected_target="not counted",
        printed="fraction",
        comparable="no: other size, an answer without mask adds nothing to the union",
    ),
}


def modes_table() -> str:
    """The card's table of `compat`, made of `MODES`."""
    columns = [
        "`compat`",
        "unit",
        "masks compared at",
        "no target by",
        'answered "none" when',
        "a target wrongly rejected",
    ]
    columns += ["added to U without target", "truth and mask empty", "printed there", "source"]
    columns += ["comparable with the published ReLA numbers?"]
    sizes = {None: "the size given (480 x 480 there)", "original": "the reference's size"}
    return markdown_table(
        columns,
        [
            [
                f"`{name}`",
                mode.unit + (" with a target" if mode.only_targets else ""),
                sizes.get(mode.resolution, f"{mode.resolution} x {mode.resolution}")
                + (", nearest corner" if mode.nearest == "corner" else ""),
                "empty true mask" if mode.truth_by_mask else "flag",
                NONE_RULES[mode.none_rule].format(mode.threshold or 0, 1 - (mode.threshold or 0)),
                "-" if mode.none_rule == "mask" else IOU_RULES[mode.rejected_target],
                "-" if mode.only_targets else "the mask, if not rejected",
                f"IoU {mode.empty_iou:g}",
                mode.printed,
                mode.source,
                mode.comparable,
            ]
            for name, mode in MODES.items()
        ],
    )


@dataclass(frozen=True)
class Verdicts:
    """One entry per sentence: pixels that count, IoU (0..1), answered "none" or not, and whether that is right."""

    intersection: np.ndarray
    union: np.ndarray
    iou: np.ndarray
    rejected: np.ndarray
    no_target: np.ndarray

    def __getitem__(self, index: np.ndarray) -> Verdicts:
        return Verdicts(*(values[index] for values in vars(self).values()))


def judge(
    rows: np.ndarray, mode: Mode, threshold: float | None = None, rejected: np.ndarray | None = None
) -> Verdicts:
    """Apply a mode to rows; `threshold` replaces the mode's own, `rejected` the whole rule."""
    no_target = rows["no_target"]
    if mode.truth_by_mask:
        no_target = rows["union"].astype(np.int64) - rows["predicted"] + rows["intersection"] == 0
    if rejected is None:
        rejected = mode.rejects(rows["no_target_score"], rows["predicted"], threshold)
    intersection, union = rows["intersection"].astype(np.int64), rows["union"].astype(np.int64)
    intersection[no_target] = 0
    union[no_target & rejected] = 0
    if mode.rejected_target == "no intersection":
        intersection[rejected] = 0
    iou = np.divide(intersection, union, out=np.full(len(rows), mode.empty_iou), where=union > 0)
    iou[no_target] = rejected[no_target]
    if mode.rejected_target == "not counted":
        unanswered = rows["no_target_score"] > mode.threshold
        intersection[unanswered] = union[unanswered] = 0
        iou[unanswered] = 0
    return Verdicts(intersection, union, iou, rejected, no_target)


def tallies(verdicts: Verdicts) -> dict[str, np.ndarray]:
    """What each sentence adds to the sums of which `scores_of` makes scores."""
    targeted = ~verdicts.no_target
    counts = {
        "sentences": np.ones(len(targeted)),
        "iou": verdicts.iou,
        "intersection": verdicts.intersection,
        "union": verdicts.union,
        "targeted": targeted,
        "accepted": targeted & ~verdicts.rejected,
        "no_target": verdicts.no_target,
        "rejected": verdicts.no_target & verdicts.rejected,
    }
    return counts | {f"Pr@{level}": targeted & (verdicts.iou >= level) for level in PRECISION_AT}


def scores_of(total: Mapping[str, float | np.ndarray], mode: Mode, any_no_target: bool) -> dict[str, float]:
    """gIoU, cIoU, T_acc, N_acc and Pr@0.7, 0.8, 0.9 of sums of `tallies`, or of arrays of sums.

    Args:
        any_no_target: whether the set has a sentence without target; ReLA reports T_acc as 0 for a set without one.
    """
    rejected, accepted = total["rejected"], total["accepted"]
    wrongly = total["targeted"] - accepted
    result = {
        "gIoU": 100 * ratio(total["iou"], total["sentences"]),
        "cIoU": 100 * ratio(total["intersection"], total["union"]),
        "T_acc": ratio(accepted, total["targeted"]) * any_no_target,
        "N_acc": ratio(rejected, total["no_target"]),
    }
    if mode.accuracies == "mabp":
        result["T_acc"] = ratio(rejected, rejected + wrongly + 1)
        result["N_acc"] = ratio(rejected, total["no_target"] + 1)
    if mode.extra:
        precision, recall = ratio(rejected, rejected + wrongly), result["N_acc"]
        result["F_2"] = ratio(5 * precision * recall, 4 * precision + recall)
        result["N+T_acc"] = result["N_acc"] + result["T_acc"]
    return result | {f"Pr@{level}": 100 * ratio(total[f"Pr@{level}"], total["targeted"]) for level in PRECISION_AT}


def headline(rows: np.ndarray, mode: Mode, threshold: float | None = None) -> dict[str, float]:
    """The published scores of all rows, then of each source (`refcoco/gIoU`, ...) when there are several.

    gIoU, cIoU and Pr@X are 0..100, T_acc and N_acc 0..1, as ReLA prints them; `always_empty/gIoU` is what answering
    "none" to everything would score.
    """
    verdicts = judge(rows, mode, threshold)
    result = _published(verdicts, mode)
    result["always_empty/gIoU"] = float(100 * ratio(np.count_nonzero(verdicts.no_target), len(rows)))
    sources = np.unique(rows["source"])
    for source in sources if len(sources) > 1 else ():
        part = _published(verdicts[rows["source"] == source], mode)
        result |= {f"{source.decode() or 'unnamed'}/{key}": value for key, value in part.items()}
    return result


def _published(verdicts: Verdicts, mode: Mode) -> dict[str, float]:
    counts = tallies(verdicts)
    total = {name: int(values.sum()) for name, values in counts.items() if name != "iou"}
    total["iou"] = fsum(verdicts.iou.tolist())
    return {name: float(value) for name, value in scores_of(total, mode, total["no_target"] > 0).items()}
