"""Boxes and scores of many sentences as arrays, and the check that they are what they should be."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import numpy as np

CELLS = 1 << 18  # scores sorted at once
LARGEST = 1e18  # of a coordinate: the area of a box, and of the hull of two, then fits into float32


def join_boxes(parts: Sequence[Sequence], kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Boxes of many sentences end to end, float32 (n, 4), and the number of each; `kind` is for messages."""
    arrays = []
    for index, part in enumerate(parts):
        # numpy reads one list of numbers faster than many short ones
        if type(part) is list and part and {*map(type, part)} == {list} and {*map(len, part)} == {4}:
            array = _numbers([*chain.from_iterable(part)], f"the boxes of {kind} {index}").reshape(-1, 4)
        else:
            array = _numbers(part, f"the boxes of {kind} {index}")
        if array.size and array.shape[1:] != (4,):
            raise ValueError(f"the boxes of {kind} sentence {index} have shape {array.shape}, they should be (n, 4)")
        arrays.append(array.reshape(-1, 4))
    return _join(arrays, np.zeros((0, 4), np.float32))


def join_scores(parts: Sequence[Sequence]) -> tuple[np.ndarray, np.ndarray]:
    """Scores of many sentences end to end, float32 (n,), and the number of each."""
    arrays = [_numbers(part, f"the scores of prediction {index}") for index, part in enumerate(parts)]
    for index, array in enumerate(arrays):
        if array.ndim != 1:
            raise ValueError(f"the scores of prediction {index} have shape {array.shape}, they should be (n,)")
    return _join(arrays, np.zeros(0, np.float32))


def _numbers(values: Sequence, name: str) -> np.ndarray:
    try:
        array = np.asarray(values)
        if array.size and array.dtype.kind not in "fiu":
            raise ValueError
        with np.errstate(over="ignore"):
            return array.astype(np.float32, copy=False)
    except (TypeError, ValueError):
        raise ValueError(f"{name} are no numbers: {str(values)[:60]}") from None


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
        sides = np.abs(corners)
        large = ((sides > LARGEST) & np.isfinite(sides)).any(axis=1)
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
    todo = np.argsort(num_boxes, kind="stable")[np.count_nonzero(num_boxes == 0) :]
    while len(todo):
        # sentences with about as many boxes make one array, filled up with -inf
        take = max(1, int(np.searchsorted(num_boxes[todo] * np.arange(1, len(todo) + 1), CELLS)))
        chunk, todo = todo[:take], todo[take:]
        place = np.arange(num_boxes[chunk].max())
        is_box = place < num_boxes[chunk, None]
        ranked = np.where(is_box, scores[np.where(is_box, first[chunk, None] + place, 0)], np.float32(-np.inf))
        ranked.sort(axis=1)
        ranked = ranked[:, ::-1]
        for row, rank in enumerate((np.zeros_like(chunk), num_targets[chunk] - 1, num_targets[chunk])):
            is_there = (rank >= 0) & (rank < ranked.shape[1])
            result[row, chunk[is_there]] = ranked[is_there, rank[is_there]]
    return tuple(result)
