"""What is left of a sentence about a video: 51 bytes, from which every score follows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from math import fsum
from typing import ClassVar

import numpy as np

from .boundaries import frame_scores
from .modes import MODES
from .run_lengths import Rle, as_rles
from .sentence_rows import SentenceRows, bootstrap, choice, flags, ratio, read_columns, whole_numbers

ROW = np.dtype(
    [
        ("sent_id", "<i8"),  # -1: anonymous
        ("image_id", "<i8"),  # of the video, -1: unknown
        ("J", "<f8"),  # mean over the frames
        ("F", "<f8"),
        ("frames", "<u4"),
        ("visible", "<u4"),  # frames in which the truth has a pixel
        ("edged", "<u4"),  # frames in which the truth has a boundary
        ("num_targets", "<i4"),  # -1: unknown
        ("no_target", "?"),
        ("rejected", "?"),  # the answer has masks, and no pixel on any frame
        ("counted", "?"),  # in the means; see `Mode`
    ]
)
# what a reference may have besides its masks and no_target, and what stands for a key it lacks
OPTIONAL = {"sent_id": -1, "video_id": "", "exp_id": "", "num_targets": -1}
VISIBLE_BINS = ("never", 0.0, 0.0), ("<50%", 0.0, 0.5), (">=50%", 0.5, 1.0), ("always", 1.0, np.inf)


class JfAccumulator(SentenceRows):
    """Scores of sentences now, means later: the same result for any order and number of processes.

    Args:
        compat: whose evaluator to follow where answers are not complete, a key of `MODES`.
    """

    row: ClassVar[np.dtype] = ROW
    verb: ClassVar[str] = "scored"

    def __init__(self, compat: str = "published") -> None:
        super().__init__()
        self.mode = MODES[choice("compat", compat, MODES)]

    def add_batch(self, *, predictions: Sequence[Mapping], references: Sequence[Mapping]) -> None:
        """Add sentences: `{"masks": [...]}` each, and `{"masks": [...], "no_target": bool}`, one mask a frame.

        A mask is a run-length dictionary (`metric.encode`, pycocotools) or an array (height, width). No masks at all,
        or None for the mask of a frame, is an answer that is not complete; see `MODES`.
        """
        if len(predictions) != len(references):
            raise ValueError(f"{len(predictions)} predictions for {len(references)} references")
        answers = read_columns(predictions, "prediction", ["masks"])["masks"]
        given = read_columns(references, "reference", ["masks", "no_target"], OPTIONAL)
        columns = {"no_target": flags("no_target", given["no_target"])}
        columns |= {name: whole_numbers(name, given[name], ROW[name]) for name in ("num_targets",) if name in given}
        columns |= _ids(given, len(references))
        names = [_name(given, index) for index in range(len(references))]
        answers = [None if masks is None else [*masks] for masks in answers]
        scores = [self._score(*parts) for parts in zip(answers, given["masks"], names)]
        for index, no_target in enumerate(columns["no_target"]):
            if no_target and scores[index]["visible"]:
                raise ValueError(f"{names[index]} has no_target and a true mask with pixels: it can have one only")
        columns |= {name: [score[name] for score in scores] for name in (scores[0] if scores else ())}
        self._append(len(references), {"num_targets": -1} | columns)

    def _score(self, masks: Sequence[Rle | None] | None, truths: Sequence[Rle], name: str) -> dict[str, float]:
        """The columns of a row that the masks of a sentence give."""
        if not len(truths):
            raise ValueError(f"the reference of {name} has no masks: give one a frame, empty where nothing is visible")
        truths = as_rles(truths, f"the reference of {name}, frame")
        fate = self._fate(masks, len(truths), name)
        if fate is not None:
            scores = frame_scores(truths, truths, name)
            result = {"J": 0.0, "F": 0.0, "rejected": False, "counted": fate != "not counted"}
        else:
            scores = frame_scores(as_rles(masks, f"the prediction of {name}, frame"), truths, name)
            result = {"J": scores.region.mean(), "F": scores.boundary.mean(), "rejected": not scores.predicted.any()}
            result["counted"] = True
        visible, edged = np.count_nonzero(scores.truth), np.count_nonzero(scores.edge)
        return result | {"frames": len(truths), "visible": visible, "edged": edged}

    def _fate(self, masks: Sequence[Rle | None] | None, num_frames: int, name: str) -> str | None:
        """None for an answer that is complete; else what becomes of it. ValueError where that is an error."""
        missing = [index for index, mask in enumerate(masks or ()) if mask is None]
        if masks is not None and len(masks) == num_frames and not missing:
            return None
        fate = self.mode.missing_frame if masks else self.mode.no_masks
        if fate == "refused" or len(masks or ()) > num_frames:
            lacks = f"the mask of frame {missing[0]}" if missing else f"{num_frames - len(masks or ())} masks"
            what = f"has {len(masks)} masks" if len(masks or ()) > num_frames else f"lacks {lacks}"
            raise ValueError(
                f"the prediction of {name} {what}; its video has {num_frames} frames: answer all of them, with an "
                'empty mask for "nothing"'
            )
        return fate

    def compute(self, *, expected: Iterable[int] | None = None) -> dict[str, float]:
        """J, F, J&F, J&F/targets, N_acc, T_acc, Final and the always-empty baseline, all 0..1; see the card.

        Args:
            expected: see `rows`.
        """
        rows = self._counted_rows(expected)
        result = {name: float(value) for name, value in _scores_of(_sums(rows), rows).items()}
        empty = {"J": _empty(rows, "visible"), "F": _empty(rows, "edged")}
        return result | {
            "always_empty/J&F": float(sum(ratio(fsum(values), len(rows)) for values in empty.values()) / 2)
        }

    def breakdown(self) -> dict[str, dict[str, float]]:
        """Scores of groups of sentences: by number of targets, and by share of the frames that show a target.

        Each has `samples`, `J`, `F`, `J&F` and `rejected`, the share (0..1) answered with empty masks only. A group
        that is empty, or of which the references say nothing, is not given.
        """
        rows = self._counted_rows()
        targets = np.where(rows["no_target"], 0, rows["num_targets"])
        share = ratio(rows["visible"], rows["frames"])
        groups = {"targeted": ~rows["no_target"]}
        groups |= {f"num_targets={count}": targets == count for count in (0, 1, 2)} | {"num_targets=3+": targets >= 3}
        for name, low, high in VISIBLE_BINS:
            inside = share == 0 if name == "never" else (share > 0) & (share >= low) & (share < high)
            groups[f"visible={name}"] = inside & ~rows["no_target"]
        return {name: _summary(rows[chosen]) for name, chosen in groups.items() if chosen.any()}

    def intervals(self, **options: float) -> dict[str, tuple[float, float]]:
        """Percentile bootstrap of the scores over videos: (low, high) each.

        Options are `resamples` (1000), `level` (0.95) and `seed` (0); see `bootstrap`.
        """
        rows = self._counted_rows()
        return bootstrap(_tallies(rows), rows["image_id"], lambda total: _scores_of(total, rows), **options)

    def table(self) -> dict[str, list]:
        """One entry per sentence and column, for `datasets.Dataset.from_dict` or `pandas.DataFrame`."""
        rows = self.rows()
        return {name: rows[name].tolist() for name in rows.dtype.names}

    def _counted_rows(self, expected: Iterable[int] | None = None) -> np.ndarray:
        rows = self.rows(expected)
        return rows[rows["counted"]]


def stable_id(*names: str) -> int:
    """A number of 63 bits for a video, or for a sentence by its video and its own name; the same in every process."""
    digest = hashlib.blake2b("\0".join(names).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def _ids(given: Mapping[str, Sequence], length: int) -> dict[str, np.ndarray]:
    """`sent_id`, of the names where there is no number, and `image_id`, of the name of the video."""
    videos, sentences = ([str(name) for name in given.get(key, [""] * length)] for key in ("video_id", "exp_id"))
    ids = whole_numbers("sent_id", given.get("sent_id", np.full(length, -1)), ROW["sent_id"])
    named = zip(ids.tolist(), videos, sentences)
    ids = [stable_id(video, name) if number < 0 and video and name else number for number, video, name in named]
    return {"sent_id": np.array(ids, np.int64), "image_id": [stable_id(video) if video else -1 for video in videos]}


def _name(given: Mapping[str, Sequence], index: int) -> str:
    """How messages call a sentence: by its video and name where it has these."""
    video, sentence, number = (
        given.get(key, [None] * (index + 1))[index] for key in ("video_id", "exp_id", "sent_id")
    )
    if video:
        return f"video {video}" + (f" sentence {sentence}" if sentence not in (None, "") else "")
    return f"sentence {index}" if number in (None, -1) else f"sentence {number}"


def _tallies(rows: np.ndarray) -> dict[str, np.ndarray]:
    """What each sentence adds to the sums of which `_scores_of` makes scores."""
    targeted = ~rows["no_target"]
    return {
        "sentences": np.ones(len(rows)),
        "J": rows["J"],
        "F": rows["F"],
        "targeted": targeted,
        "target J": np.where(targeted, rows["J"], 0),
        "target F": np.where(targeted, rows["F"], 0),
        "accepted": targeted & ~rows["rejected"],
        "no_target": rows["no_target"],
        "rejected": rows["no_target"] & rows["rejected"],
    }


def _sums(rows: np.ndarray) -> dict[str, float]:
    return {name: fsum(values.tolist()) for name, values in _tallies(rows).items()}


def _scores_of(total: Mapping[str, float | np.ndarray], rows: np.ndarray) -> dict[str, float | np.ndarray]:
    result = {name: ratio(total[name], total["sentences"]) for name in ("J", "F")}
    result["J&F"] = (result["J"] + result["F"]) / 2
    result["J&F/targets"] = ratio(total["target J"] + total["target F"], 2 * np.asarray(total["targeted"]))
    result["N_acc"] = ratio(total["rejected"], total["no_target"])
    result["T_acc"] = ratio(total["accepted"], total["targeted"])
    if rows["no_target"].any():
        result["Final"] = (result["J&F"] + result["N_acc"] + result["T_acc"]) / 3
    return result


def _empty(rows: np.ndarray, shown: str) -> np.ndarray:
    """J ("visible") or F ("edged") that an answer without a pixel scores: the share of frames that show nothing."""
    return ratio(rows["frames"] - rows[shown], rows["frames"])


def _summary(rows: np.ndarray) -> dict[str, float]:
    scores = {name: float(ratio(fsum(rows[name].tolist()), len(rows))) for name in ("J", "F")}
    rejected = float(ratio(np.count_nonzero(rows["rejected"]), len(rows)))
    return {"samples": len(rows), **scores, "J&F": (scores["J"] + scores["F"]) / 2, "rejected": rejected}
