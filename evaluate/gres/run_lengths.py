"""COCO run-length strings: checked, and read many at once with numpy, without painting any mask.

Metrics of masks share this file. Each is a Space of its own, so it lies in each of their folders; the copies are
identical.

A COCO string holds the lengths of alternating background and foreground runs, column by column. The masks of a batch
lie on one axis of pixels, mask after mask. On this axis the foreground runs of predictions and truths are intervals;
their starts and ends, sorted together, give the pixels that both cover.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np
from pycocotools import mask as coco

if TYPE_CHECKING:
    import torch

CHUNK = 3 << 15  # characters read at once: their runs stay in a processor's cache and need no fresh memory
DIGITS = 6  # of a number in a run-length string, 5 bits each: it then fits into 32 bits
LARGEST_MASK = 1 << 29  # pixels: no run needs more digits


class Rle(TypedDict):
    """A COCO run-length mask: `size` is [height, width] in pixels, `counts` the compressed string (str or bytes)."""

    size: Sequence[int]
    counts: str | bytes


class Runs(NamedTuple):
    """Foreground runs of n masks that lie one after the other on one axis of pixels.

    Attributes:
        edges: first pixel of a run and the pixel after its last, alternating, int64 (2 * runs,); ascending.
        num_runs: runs of each mask, int64 (n,); a run may have no pixels.
        area: foreground pixels of each mask, int64 (n,).
    """

    edges: np.ndarray
    num_runs: np.ndarray
    area: np.ndarray


def encode(mask: np.ndarray | torch.Tensor) -> Rle:
    """One mask (height, width) of bool or 0/1, numpy or torch, as `{"size": [height, width], "counts": str}`."""
    pixels = np.asarray(mask if isinstance(mask, np.ndarray) else mask.numpy(force=True))
    if pixels.ndim != 2:
        raise ValueError(f"a mask is (height, width), this one is {pixels.shape}: encode a batch one by one")
    rle = coco.encode(np.asfortranarray(pixels != 0, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}


def as_rles(masks: Sequence[Rle | np.ndarray | torch.Tensor], side: str) -> list[Rle]:
    """Masks as people have them, run lengths or arrays, as run lengths; ValueError names the first that is neither."""
    return [
        mask if type(mask) is dict and "size" in mask and "counts" in mask else _as_rle(mask, f"{side} {index}")
        for index, mask in enumerate(masks)
    ]


def mask_sizes(masks: Sequence[Rle], side: str) -> np.ndarray:
    """Height and width of each mask, int64 (n, 2); ValueError for what is not two positive whole numbers."""
    sizes = [mask["size"] for mask in masks]
    try:
        if not sizes or {*map(len, sizes)} == {2}:
            flat = np.array([*chain.from_iterable(sizes)])
            array = flat.astype(np.int64).reshape(-1, 2)
            # the sides first, for the product of two large ones overflows
            small = 0 < array.min(initial=1) <= array.max(initial=1) < LARGEST_MASK
            small = small and array.prod(axis=1).max(initial=0) < LARGEST_MASK
            if small and (flat.dtype.kind in "iu" or not sizes):
                return array
    except (TypeError, ValueError, OverflowError):
        pass  # the first bad one is named below
    index = next(index for index, size in enumerate(sizes) if not _is_size(size))
    raise ValueError(
        f"the mask of {side} {index} has the size {sizes[index]!r}: a size is [height, width], two positive whole "
        f"numbers of pixels whose product is below {LARGEST_MASK}"
    )


def chunks(predictions: Sequence[Rle], truths: Sequence[Rle], pixels: np.ndarray) -> Iterator[slice]:
    """Parts of a batch of about `CHUNK` characters and at most 2**31 pixels: a place on the axis then fits 32 bits."""
    pairs = zip(predictions, truths)
    characters = np.cumsum([len(one["counts"]) + len(other["counts"]) for one, other in pairs])
    pixels = np.cumsum(pixels)
    start, before = 0, np.zeros(2, np.int64)
    while start < len(pixels):
        end = min(
            np.searchsorted(characters, before[0] + CHUNK, "right"),
            np.searchsorted(pixels, before[1] + (1 << 31), "left"),
        )
        end = max(int(end), start + 1)
        yield slice(start, end)
        start, before = end, np.array([characters[end - 1], pixels[end - 1]])


def read_runs(masks: Sequence[Rle], sizes: np.ndarray, side: str, offset: int) -> Runs:
    """Read the run-length strings of some masks, each of which follows the one before on the axis of pixels."""

    def refuse(faulty: np.ndarray, fault: str) -> None:
        if faulty.any():
            index = int(np.argmax(faulty))
            raise ValueError(
                f"the mask of {side} {offset + index} {fault}: size {sizes[index].tolist()}, counts "
                f"{masks[index]['counts'][:40]!r}; encode masks with metric.encode or pycocotools.mask.encode"
            )

    strings = [_as_text(mask["counts"]) for mask in masks]
    refuse(np.array([not string for string in strings]), "is empty")
    num_counts = _count_numbers(strings, refuse)
    # rows of (foreground, background): a mask begins with background, so its first row is (0, first count); one that
    # ends with foreground gets a background of 0
    padded = ["0" + string if odd else "0" + string + "0" for string, odd in zip(strings, (num_counts % 2).tolist())]
    counts, long = _join_digits(_codes(padded))
    if len(long):
        refuse(
            np.bincount(np.searchsorted(np.cumsum([*map(len, padded)]), long, "right")) > 0, "has a number too long"
        )
    num_rows = num_counts // 2 + 1
    first = np.cumsum(num_rows) - num_rows
    last = first + num_rows - 1
    lengths = _undo_differences(counts, first, num_rows)
    lengths[1::2][last[num_counts % 2 == 0]] = 0
    if lengths.min() < 0:
        refuse(np.minimum.reduceat(lengths, 2 * first) < 0, "has a run of negative length")
    ends = lengths.astype(np.int64)
    np.cumsum(ends, out=ends)
    refuse(np.diff(ends[2 * last + 1], prepend=0) != sizes.prod(axis=1), "does not fill its size")
    # a run of foreground lies between the end of the background before it and its own end; the first row has none
    # before it, and a run without pixels ends the last mask instead
    edges = np.append(ends[1:], ends[-1])
    return Runs(edges, num_rows, np.add.reduceat(lengths[0::2], first, dtype=np.int64))


def shared_pixels(predictions: Runs, truths: Runs) -> np.ndarray:
    """Pixels that both masks of each pair cover, int64 (n,)."""
    middle = len(predictions.edges)
    # one number an edge: its place, and in the lowest bit whether a run ends there
    keys = np.empty(middle + len(truths.edges), np.uint32)
    for part, runs in ((slice(0, middle), predictions), (slice(middle, None), truths)):
        np.left_shift(runs.edges, 1, out=keys[part], casting="unsafe")
        keys[part][1::2] |= 1
    keys.sort(kind="stable")  # merges two ascending halves in one pass
    # how many runs are open after each edge: two where prediction and truth overlap
    steps = (keys & 1).view(np.int32)
    steps *= -2
    steps += 1
    num_open = np.cumsum(steps, dtype=np.int32)
    keys >>= 1
    shared = np.zeros(len(keys), np.uint32)
    np.subtract(keys[1:], keys[:-1], out=shared[:-1])
    shared *= num_open == 2
    # each pair's edges follow those of the pair before; where pairs touch, edges change places that add nothing
    num_edges = 2 * (predictions.num_runs + truths.num_runs)
    result = np.zeros(len(num_edges), np.int64)
    if len(keys):
        first = np.cumsum(num_edges) - num_edges
        filled = num_edges > 0
        result[filled] = np.add.reduceat(shared, first[filled], dtype=np.int64)
    return result


def _as_rle(mask: Rle | np.ndarray | torch.Tensor, name: str) -> Rle:
    if hasattr(mask, "shape"):
        return encode(mask)
    if isinstance(mask, (list, tuple)):
        raise ValueError(
            f"the mask of {name} is a list: polygons must be painted at the size of the image first, "
            "pycocotools.mask.merge(pycocotools.mask.frPyObjects(polygons, height, width))"
        )
    raise ValueError(
        f'the mask of {name} is {str(mask)[:40]!r}: give {{"size": [height, width], "counts": str or bytes}}, '
        "or a numpy or torch array (height, width)"
    )


def _is_size(size: object) -> bool:
    if not isinstance(size, (list, tuple, np.ndarray)) or len(size) != 2:
        return False
    whole = all(isinstance(side, (int, np.integer)) for side in size)
    return whole and min(size) > 0 and int(size[0]) * int(size[1]) < LARGEST_MASK


def _as_text(counts: str | bytes) -> str:
    if isinstance(counts, str):
        return counts
    if isinstance(counts, bytes):
        return counts.decode("latin-1")
    raise ValueError(f"RLE counts must be the compressed COCO string, not {type(counts).__name__}: see encode")


def _codes(strings: Sequence[str]) -> np.ndarray:
    """All characters of some strings, uint8, less the 48 that COCO adds to make them printable."""
    return np.frombuffer("".join(strings).encode("latin-1", "replace"), np.uint8) - np.uint8(48)


def _count_numbers(strings: Sequence[str], refuse: Callable[[np.ndarray, str], None]) -> np.ndarray:
    """How many numbers each string holds, int64 (n,). A character has 5 bits of one, and 32 if more follow."""
    codes = _codes(strings)
    lengths = np.fromiter(map(len, strings), np.int64, len(strings))
    last = np.cumsum(lengths) - 1
    foreign = not all(map(str.isascii, strings))
    if foreign or codes.max() > 63 or codes[last].max() > 31:
        parts = np.split(codes, last[:-1] + 1)
        broken = [max(part) > 63 or part[-1] > 31 or not text.isascii() for part, text in zip(parts, strings)]
        refuse(np.array(broken), "is no RLE string")
    return np.add.reduceat(codes < 32, last - lengths + 1, dtype=np.int64)


def _join_digits(codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Signed numbers of 5-bit digits, the lowest first, int32; and the places of digits beyond the sixth."""
    more = codes > 31
    low = codes & 31
    # the fifth bit of a number's highest digit is its sign: such a digit is 32 less
    sign = low & ~(codes >> 1) & 16
    digits = (low - (sign << 1)).view(np.int8).astype(np.int32)
    # gather each number in its highest digit: second digits take in the first, then third digits the second, ...
    place = np.flatnonzero(more) + 1
    place = place[~more[place - 2]]
    for level in range(1, DIGITS):
        digits[place] = (digits[place] << 5 * level) + digits[place - 1]
        place = place[more[place]] + 1
    return digits[~more], place


def _undo_differences(counts: np.ndarray, first: np.ndarray, num_rows: np.ndarray) -> np.ndarray:
    """Run lengths, int32, from numbers of which each, from a mask's third row on, is less the one a row above.

    Args:
        counts: rows of (foreground, background) one after the other, int32 (2 * rows,).
        first: first row of each mask; num_rows: its number of rows.
    """
    # both columns in one number, so that one running sum serves them: foreground is the lower half
    rows = counts[0::2].astype(np.int64) + (counts[1::2].astype(np.int64) << 32)
    # the sum runs over all masks: where a mask begins, and where its first row ends, take off what has been summed up
    own = rows[first]
    several = num_rows > 1
    final = np.where(several, np.add.reduceat(rows, first) - own, own)
    rows[first[1:]] -= final[:-1]
    rows[first[several] + 1] -= own[several]
    return np.cumsum(rows).view(np.int32)
