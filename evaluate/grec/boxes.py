"""Boxes and scores of many sentences as arrays, and the check that they are what they should be."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import chain

import numpy as np

CELLS = 1 << 18  # scores sorted at once
LARGEST = 1e18  # of a coordinate: the area of a box, and of the hull of two, then fits into float32


def join_boxes(parts: Sequence[Sequence], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of many sentences end to end, float32 (n, 4), and the number of each; `kind` is for messages."""
    arrays = []
    for index, part in enumerate(parts):
        if type(part) is list and part and {*map(type, part)} == {list} and {*map(len, part)} == {4}:
            boxes = _numbers([*chain.from_iterable(part)], f"boxes of {kind}", index).reshape(-1, 4)
        else:
            boxes = _numbers(part, f"boxes of {kind}", index)
        if boxes.shape[1:] != (4,):
            if boxes.size:
                raise ValueError(
                    f"the boxes of {kind} sentence {index} have shape {boxes.shape}, they should be (n, 4)"
                )
            boxes = boxes.reshape(0, 4)
        arrays.append(boxes)
    return _join(arrays, np.zeros((0, 4), np.float32))


def join_scores(parts: Sequence[Sequence]) -> tuple[np.ndarray, np.ndarray]:
    """Scores of many sentences end to end, float32 (n,), and the number of each."""
    arrays = [_numbers(part, "scores of prediction", index) for index, part in enumerate(parts)]
    for index, scores in enumerate(arrays):
        if scores.ndim != 1:
            raise ValueError(f"the scores of prediction {index} have shape {scores.shape}, they should be (n,)")
    return _join(arrays, np.zeros(0, np.float32))


def _numbers(values: Sequence, name: str, index: int) -> np.ndarray:
    """Numbers as float32; a number beyond float32 becomes infinite."""
    if type(values) is np.ndarray and values.dtype == np.float32:
        return values
    try:
        if type(values) is list and values and type(values[0]) in (float, int):
            return np.frombuffer(array("f", values), np.float32)  # reads a list of numbers faster than numpy does
        numbers = np.asarray(values)
        if numbers.size and numbers.dtype.kind not in "fiu":
            raise ValueError
        with np.errstate(over="ignore"):
            return numbers.astype(np.float32, copy=False)
    except (TypeError, ValueError):
        raise ValueError(f"the {name} {index} are no numbers: {str(values)[:60]}") from None


def _join(arrays: Sequence[np.ndarray], empty: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.concatenate([empty, *arrays]), np.fromiter(map(len, arrays), np.int64, len(arrays))


def valid_boxes(boxes: np.ndarray) -> np.ndarray:
    """Whether boxes (..., 4) are finite with x0 <= x1 and y0 <= y1."""
    return np.isfinite(boxes).all(axis=-1) & (boxes[..., 2:] >= boxes[..., :2]).all(axis=-1)


def refuse_bad_boxes(
    boxes: np.ndarray, num_boxes: np.ndarray, num_scores: np.ndarray, truths: np.ndarray, num_targets: np.ndarray
) -> None:
    """Raise ValueError, with the sentence, for inputs of which no score can be made."""
    if (wrong := num_boxes != num_scores).any():
        index = int(np.argmax(wrong))
        raise ValueError(f"prediction {index} has {num_boxes[index]} boxes and {num_scores[index]} scores")
    for kind, corners, lengths in (("prediction", boxes, num_boxes), ("reference", truths, num_targets)):
        # one pass says whether any is large; an infinite or nan corner of a prediction is no error
        large = np.abs(corners) > LARGEST
        if not large.any():
            continue
        large = (large & np.isfinite(corners)).any(axis=1)
        if large.any():
            box, index = _first(corners, large, lengths)
            raise ValueError(f"{kind} {index} has the box {box}: its area overflows, coordinates are pixels")
    if not (good := valid_boxes(truths)).all():
        box, index = _first(truths, ~good, num_targets)
        raise ValueError(
            f"reference {index} has the box {box}: boxes are x0, y0, x1, y1, pixels, with x0 <= x1 and y0 <= y1, and "
            "a sentence without target has none"
        )


def _first(boxes: np.ndarray, chosen: np.ndarray, lengths: np.ndarray) -> tuple[list[float], int]:
    place = int(np.argmax(chosen))
    return boxes[place].tolist(), int(np.searchsorted(np.cumsum(lengths), place, side="right"))


def ranked_scores(
    scores: np.ndarray, num_boxes: np.ndarray, num_targets: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each sentence the best score, that of as many boxes as targets, and the next; -inf where there are fewer."""
    result = np.full((3, len(num_boxes)), -np.inf, np.float32)
    first = np.cumsum(num_boxes) - num_boxes
    waiting = np.argsort(num_boxes, kind="stable")[np.count_nonzero(num_boxes == 0) :]
    while len(waiting):
        # sentences with about as many boxes make one array, filled up with -inf
        take = max(1, int(np.searchsorted(num_boxes[waiting] * np.arange(1, len(waiting) + 1), CELLS)))
        chunk, waiting = waiting[:take], waiting[take:]
        place = np.arange(num_boxes[chunk].max())
        is_box = place < num_boxes[chunk, None]
        ranked = np.where(is_box, scores[np.where(is_box, first[chunk, None] + place, 0)], np.float32(-np.inf))
        ranked.sort(axis=1)
        ranked = ranked[:, ::-1]
        for row, rank in enumerate((np.zeros_like(chunk), num_targets[chunk] - 1, num_targets[chunk])):
            is_there = (rank >= 0) & (rank < ranked.shape[1])
            result[row, chunk[is_there]] = ranked[is_there, rank[is_there]]
    return tuple(result)
