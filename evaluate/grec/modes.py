"""The choices in which published evaluators of boxes differ. A new mode of `compat` is one entry in `MODES`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .sentence_rows import markdown_table


@dataclass(frozen=True)
class Mode:
    """What one published evaluator does.

    Attributes:
        source: repository, commit and lines of the evaluator.
        iou: overlap of boxes, "giou" or "iou".
        strict: whether a box must score above the threshold, or at least as much.
        float32: whether the threshold is rounded to float32, as scores are: a float32 0.7 then reaches 0.7.
        only_first: whether only the first true box is looked at, and two boxes without area overlap by 0.
        batch_size: sentences of a batch, where scores are means over batches; None: of all sentences.
        printed: how the evaluator prints its scores; for the card.
        comparable: whether the scores can be compared with those published for gRefCOCO's MDETR; for the card.
    """

    source: str
    iou: str = "giou"
    strict: bool = False
    float32: bool = False
    only_first: bool = False
    batch_size: int | None = None
    printed: str = "percent"
    comparable: str = "yes"


INSTANCEVG = Mode(
    "Dmmm1997/InstanceVG@49fd8fa instancevg/evaluations/grefcoco.py:162-250",
    comparable="yes, where boxes are compared at the size of the image (320 there)",
)
MODES = {
    "published": Mode("henghuiding/gRefCOCO@41a8f00 mdetr/datasets/refexp.py:21-123", printed="fraction"),
    "mmdet": Mode(
        "open-mmlab/mmdetection 3.3.0 mmdet/evaluation/metrics/grefcoco_metric.py:46-117",
        iou="iou",
        float32=True,
        only_first=True,
        printed="fraction",
        comparable="no: only the first target counts, plain IoU",
    ),
    "deris": replace(
        INSTANCEVG,
        source="Dmmm1997/DeRIS@2406687 deris/evaluations/grefcoco.py:162-250",
        strict=True,
        comparable="yes, but for scores equal to the threshold (0.7; the large model 0.9: `thresh_score=0.9`)",
    ),
    "propvg": replace(
        INSTANCEVG,
        source="Dmmm1997/PropVG@c566fc2 propvg/evaluations/grefcoco.py:162-250",
        strict=True,
        comparable="yes, but for scores equal to the threshold",
    ),
    "instancevg": INSTANCEVG,
    "simvg": Mode(
        "Dmmm1997/SimVG@29df6a4 simvg/apis/test.py:91-163, 250-251",
        batch_size=64,
        comparable="no: a mean over batches, in which a batch without a correct rejection has N_acc 0; no T_acc",
    ),
}


def modes_table() -> str:
    """The card's table of `compat`, made of `MODES`."""
    columns = ["`compat`", "unit", "overlap", "a box is kept when", "targets", "printed there", "source"]
    columns += ["comparable with the published MDETR numbers?"]
    return markdown_table(
        columns,
        [
            [
                f"`{name}`",
                "sentence" if mode.batch_size is None else f"batch (`batch_size={mode.batch_size}`)",
                "generalised IoU" if mode.iou == "giou" else "IoU",
                f"score {'>' if mode.strict else '>='} {'float32(0.7)' if mode.float32 else '0.7'}",
                "the first only" if mode.only_first else "all",
                mode.printed,
                mode.source,
                mode.comparable,
            ]
            for name, mode in MODES.items()
        ],
    )
