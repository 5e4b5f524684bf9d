"""J and F of DAVIS for pairs of masks, exactly, from run lengths: no mask is painted.

J is the overlap of two masks, F how well their boundaries agree. A pixel lies on the boundary where it, the one to the
right, the one below and the one diagonally below are not all alike; beyond the last row and column these repeat.
Boundaries agree where they are at most `radius` pixels apart.

All masks of a batch lie on one axis: column after column, mask after mask, with free places between columns and
between masks so that a distance of `radius` never reaches a pixel of another column or mask by mistake.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, isqrt
from typing import NamedTuple

import numpy as np

from .run_lengths import Rle, Runs, chunks, mask_sizes, read_runs, shared_pixels

TOLERANCE = 0.008  # of the diagonal of a frame: how far apart two boundaries may be, as in DAVIS


class FrameScores(NamedTuple):
    """What is known of n pairs of masks.

    Attributes:
        region: J, float64 (n,), 0..1.
        boundary: F, float64 (n,), 0..1.
        predicted: pixels of the prediction, int64 (n,).
        truth: pixels of the truth, int64 (n,).
        edge: boundary pixels of the truth, int64 (n,); a mask that is empty or fills its frame has none.
    """

    region: np.ndarray
    boundary: np.ndarray
    predicted: np.ndarray
    truth: np.ndarray
    edge: np.ndarray


class Axis(NamedTuple):
    """Where the pixels of masks of one size lie.

    Attributes:
        height, width: of a mask, in pixels.
        radius: distance at which two boundaries still agree, in pixels.
        column: places of a column; those below the last row continue it.
        margin: columns before each mask.
    """

    height: int
    width: int
    radius: int
    column: int
    margin: int

    def masks_of(self, places: np.ndarray) -> np.ndarray:
        """Which mask each place belongs to."""
        return places // (self.column * (self.width + self.margin))


def frame_scores(predictions: Sequence[Rle], truths: Sequence[Rle], sentence: str) -> FrameScores:
    """J and F of every pair, where all masks have one size.

    Args:
        sentence: what the masks answer, for messages.

    Raises:
        ValueError: a mask is broken, or of another size than the first truth.
    """
    sides = {"prediction": f"prediction of {sentence}, frame", "reference": f"reference of {sentence}, frame"}
    sizes = [mask_sizes(masks, side) for masks, side in zip((predictions, truths), sides.values())]
    for found, side in zip(sizes, sides.values()):
        if (other := (found != sizes[1][0]).any(axis=1)).any():
            index = int(np.argmax(other))
            raise ValueError(
                f"the mask of {side} {index} is {found[index].tolist()} and the first true mask is "
                f"{sizes[1][0].tolist()} (height, width): all masks of a sentence must have the size of the video"
            )
    height, width = sizes[1][0].tolist()
    radius = ceil(TOLERANCE * float(np.linalg.norm((height, width))))
    axis = Axis(height, width, radius, height + radius, radius + 1)
    parts = []
    for part in chunks(predictions, truths, sizes[1].prod(axis=1)):
        both = [
            read_runs(masks[part], size[part], side, part.start)
            for masks, size, side in zip((predictions, truths), sizes, sides.values())
        ]
        parts.append(_score(*both, axis))
    return FrameScores(*map(np.concatenate, zip(*parts)))


def _score(predictions: Runs, truths: Runs, axis: Axis) -> FrameScores:
    intersection = shared_pixels(predictions, truths)
    union = predictions.area + truths.area - intersection
    region = np.divide(intersection, union, out=np.ones(len(union)), where=union > 0)
    predicted, true = (_boundary(runs, axis) for runs in (predictions, truths))
    num_predicted, num_true = (
        np.bincount(axis.masks_of(places), minlength=len(union)) for places in (predicted, true)
    )
    far = [np.bincount(axis.masks_of(_far(*pair, axis)), minlength=len(union)) for pair in _both_ways(predicted, true)]
    # one side without boundary: precision 1 and recall 0, or the reverse; both: 1 and 1
    precision = np.divide(num_predicted - far[0], num_predicted, out=np.ones(len(union)), where=num_predicted > 0)
    recall = np.divide(num_true - far[1], num_true, out=np.ones(len(union)), where=num_true > 0)
    precision[(num_predicted > 0) & (num_true == 0)] = 0
    recall[(num_true > 0) & (num_predicted == 0)] = 0
    both = precision + recall
    boundary = np.divide(2 * precision * recall, both, out=np.zeros(len(union)), where=both > 0)
    return FrameScores(region, boundary, predictions.area, truths.area, num_true)


def _both_ways(one: np.ndarray, other: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    return (one, other), (other, one)


def _boundary(runs: Runs, axis: Axis) -> np.ndarray:
    """Places of all boundary pixels, ascending."""
    edges = _edges_on(runs, axis)
    # a run and its copies one place up, one column to the left and both: as many of them cover a place as of the four
    # pixels that decide are foreground. The lowest bit of a key is 1 where a run ends.
    ends = np.arange(len(edges)) % 2
    keys = np.concatenate([(edges - step) * 2 + ends for step in (0, 1, axis.column, axis.column + 1)])
    keys.sort(kind="stable")  # merges ascending parts
    covered = np.cumsum(1 - 2 * (keys & 1))
    places = keys >> 1
    mixed = np.flatnonzero((covered[:-1] > 0) & (covered[:-1] < 4)) if len(keys) else np.zeros(0, np.int64)
    first, lengths = places[mixed], places[mixed + 1] - places[mixed]
    places = np.repeat(first - np.cumsum(lengths) + lengths, lengths) + np.arange(lengths.sum())
    columns, rows = np.divmod(places, axis.column)
    return places[(rows < axis.height) & (columns % (axis.width + axis.margin) >= axis.margin)]


def _edges_on(runs: Runs, axis: Axis) -> np.ndarray:
    """First place of each run and the place after its last, alternating; the last column of a mask comes twice."""
    start, end = runs.edges[0::2], runs.edges[1::2]
    has_pixels = end > start
    start, last = start[has_pixels], end[has_pixels] - 1
    column, row = np.divmod(start, axis.height)
    mask = column // axis.width
    start = (column + (mask + 1) * axis.margin) * axis.column + row
    column, row = np.divmod(last, axis.height)
    # the last row repeats down to the next column
    row[row == axis.height - 1] = axis.column - 1
    end = (column + (mask + 1) * axis.margin) * axis.column + row + 1
    edges = np.stack([start, end], axis=1).ravel()
    # the last column repeats once, in the margin
    last_column = ((mask + 1) * (axis.width + axis.margin) - 1) * axis.column
    at_right = end > last_column
    if not at_right.any():
        return edges
    copies = np.stack([np.maximum(start, last_column)[at_right], end[at_right]], axis=1).ravel() + axis.column
    return np.concatenate([edges, copies])


def _far(places: np.ndarray, others: np.ndarray, axis: Axis) -> np.ndarray:
    """Those of `places` from which none of `others` is within the radius; both ascend."""
    if not len(places) or not len(others):
        return places
    sentinel = np.append(others, np.iinfo(np.int64).max)
    far = []
    for step in sorted(range(-axis.radius, axis.radius + 1), key=abs):
        reach = isqrt(axis.radius**2 - step**2)
        lowest = places + (step * axis.column - reach)
        places = places[sentinel[sentinel.searchsorted(lowest)] > lowest + 2 * reach]
        if not len(places):
            break
        if step == 0:
            is_near = _is_near(places, others, axis)
            far.append(places[~is_near])
            places = places[is_near]
    return np.concatenate([*far, places])


def _is_near(places: np.ndarray, others: np.ndarray, axis: Axis) -> np.ndarray:
    """Whether any of `others` lies in the square of `radius` pixels around which a place is, or in the 8 around it."""
    squares = [[side // axis.radius for side in np.divmod(these, axis.column)] for these in (places, others)]
    shape = [1 + max(int(one.max()), int(other.max())) for one, other in zip(*squares)]
    occupied = np.zeros([side + 2 for side in shape], bool)
    occupied[squares[1][0] + 1, squares[1][1] + 1] = True
    rows = occupied[:, :-2] | occupied[:, 1:-1] | occupied[:, 2:]
    return (rows[:-2] | rows[1:-1] | rows[2:])[tuple(squares[0])]
