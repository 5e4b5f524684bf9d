"""The choices in which published evaluators of videos differ. A new mode of `compat` is one entry in `MODES`."""

from __future__ import annotations

from dataclasses import dataclass

from .sentence_rows import markdown_table

FATES = ("refused", "0", "not counted")  # what an evaluator makes of a sentence that is not answered in full


@dataclass(frozen=True)
class Mode:
    """What one published evaluator does with answers that are not complete; J and F are the same in all.

    Attributes:
        source: repository, commit and lines of the evaluator.
        no_masks: what becomes of a sentence whose answer has no masks at all (in a folder: the video is missing).
        missing_frame: what becomes of a sentence whose answer lacks the mask of a frame. Each is one of `FATES`: an
            error, J = F = 0, or left out of every mean.
        printed: how the evaluator prints its scores; for the card.
        comparable: whether the scores can be compared with those published for MeViS; for the card.
    """

    source: str
    no_masks: str = "refused"
    missing_frame: str = "refused"
    printed: str = "fraction"
    comparable: str = "yes"


ORIGINAL = "henghuiding/MeViS@7c0620b tools/eval_mevis.py:18-54, tools/metrics.py"
MODES = {
    "published": Mode(f"{ORIGINAL}, on complete answers"),
    "original": Mode(
        ORIGINAL,
        no_masks="0",
        missing_frame="not counted",
        comparable="only where every video is answered in full: a sentence that is left out raises the mean",
    ),
    "momentseg": Mode(
        "Dmmm1997/MomentSeg@a118d15 tools/eval/eval_mevis.py:32-85, of masks in JSON",
        no_masks="not counted",
        missing_frame="not counted",
        printed="percent, rounded",
        comparable="only where every sentence is answered in full",
    ),
    "visa": Mode(
        "cilinyan/VISA@40ae6e8 tools/eval_revos.py:25-73",
        no_masks="0",
        missing_frame="0",
        printed="percent, rounded for each sentence",
        comparable="yes for each sentence; printed there is the mean of two kinds of sentences of ReVOS",
    ),
}


def modes_table() -> str:
    """The card's table of `compat`, made of `MODES`."""
    columns = ["`compat`", "no masks for a sentence", "a frame's mask is missing", "printed there", "source"]
    columns += ["comparable with the published MeViS numbers?"]
    names = {"0": "J = F = 0"}
    return markdown_table(
        columns,
        [
            [
                f"`{name}`",
                names.get(mode.no_masks, mode.no_masks),
                names.get(mode.missing_frame, mode.missing_frame),
                mode.printed,
                mode.source,
                mode.comparable,
            ]
            for name, mode in MODES.items()
        ],
    )
