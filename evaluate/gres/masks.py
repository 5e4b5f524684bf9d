"""Masks as COCO run-length strings, and how much two of them overlap, without painting any.

A COCO string holds the lengths of alternating background and foreground runs, column by column. A batch of masks is
read at once with numpy and laid on one axis, mask after mask. On this axis the foreground runs of predictions and
truths are intervals; their starts and ends, sorted together, give the pixels that both cover.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import numpy as np
from pycocotools import mask as coco

if TYPE_CHECKING:
    import torch

CHUNK = 3 << 15  # characters read at once: their runs stay in a processor's cache and need no fresh memory
DIGITS = 6  # of a number in a run-length string, 5 bits each: it then fits into 32 bits
LARGEST_MASK = 1 << 29  # pixels: no run needs more digits
RUN = 255  # words of eight pixels added up at once: a byte holds as many
BLOCK = 32  # runs of words intersected at once, in 64 KiB that are used again: fresh memory costs more than counting


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


def foreground(logits: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """Two-channel logits (..., 2, height, width) to bool masks: the published argmax, a tie being background."""
    background, target = logits[..., 0, :, :], logits[..., 1, :, :]
    if isinstance(logits, np.ndarray) or logits.device.type != "cpu" or logits.dtype.itemsize < 4:
        return target > background
    import torch

    # numpy compares five times faster than torch does on a CPU
    return torch.from_numpy(np.asarray(target.numpy(force=True) > background.numpy(force=True)))


def rle_overlaps(
    predictions: Sequence[Rle],
    truths: Sequence[Rle],
    resolution: int | str | None = None,
    nearest: str = "center",
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixel counts of each pair: (intersection, union, predicted area), int64 arrays of length n.

    Args:
        resolution: where a pair is compared: None as given, "original" at the truth's size, int on a square.
        nearest: the pixel that a resized mask takes, "center" or "corner"; see `_source_pixels`.

    Raises:
        ValueError: a mask's string is broken or does not fill its size, or a pair has two sizes and no `resolution`.
    """
    pred_sizes, true_sizes = _sizes(predictions, "prediction"), _sizes(truths, "reference")
    sizes = true_sizes if resolution in (None, "original") else np.full_like(true_sizes, resolution)
    if resolution is None and (wrong := (pred_sizes != true_sizes).any(axis=1)).any():
        index = int(np.argmax(wrong))
        raise ValueError(
            f"prediction {index} is {pred_sizes[index].tolist()} and its reference {true_sizes[index].tolist()} "
            '(height, width): predict at that size, or choose a common one with resolution="original" or 480'
        )
    pixels = sizes.prod(axis=1)
    counts = []
    largest = np.maximum(pixels, np.maximum(pred_sizes.prod(axis=1), true_sizes.prod(axis=1)))
    for part in _chunks(predictions, truths, largest):
        both = []
        for masks, old, side in ((predictions, pred_sizes, "prediction"), (truths, true_sizes, "reference")):
            runs = _read_runs(masks[part], old[part], side, part.start)
            both.append(_resample(runs, old[part], sizes[part], nearest))
        counts.append([_shared_pixels(*both), both[0].area, both[1].area])
    intersection, predicted, truth = np.concatenate([np.zeros((3, 0), np.int64), *counts], axis=1)
    return intersection, predicted + truth - intersection, predicted


def num_pixels(truths: Sequence[Rle], resolution: int | str | None) -> np.ndarray:
    """Pixels of the size at which each pair is compared, int64 (n,)."""
    if resolution in (None, "original"):
        return _sizes(truths, "reference").prod(axis=1)
    return np.full(len(truths), resolution**2)


def dense_overlaps(
    predictions: np.ndarray | torch.Tensor, truths: np.ndarray | torch.Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixel counts of bool masks (n, height, width): (intersection, union, predicted area), int64 arrays of length n.

    Tensors are counted on their own device and only the counts are copied.
    """
    if not isinstance(predictions, np.ndarray) and predictions.device.type == "cpu":
        predictions, truths = predictions.numpy(), truths.numpy()
    counts = _count_here if isinstance(predictions, np.ndarray) else _count_on_device
    intersection, predicted, truth = counts(predictions, truths)
    return intersection, predicted + truth - intersection, predicted


def _count_on_device(predictions: torch.Tensor, truths: torch.Tensor) -> np.ndarray:
    """Intersection, predicted and true area of each pair, int64 (3, n)."""
    areas = [masks.sum((-2, -1)).numpy(force=True) for masks in (predictions & truths, predictions, truths)]
    return np.stack(areas)


def _count_here(predictions: np.ndarray, truths: np.ndarray) -> np.ndarray:
    """Intersection, predicted and true area of each pair, int64 (3, n).

    Each mask is read once, as 64-bit words that hold eight pixels: added up, `RUN` of them do not carry. Where one of
    the two has no pixel in a run of words there is nothing to intersect.
    """
    pred_words, true_words = _words(predictions), _words(truths)
    num_pairs, num_words = pred_words.shape
    starts = np.arange(0, num_words, RUN)
    sums = np.zeros((num_pairs, 3, len(starts)), np.uint64)
    shared_words = np.empty(BLOCK * RUN, np.uint64)
    for pred, truth, (overlap, pred_sums, true_sums) in zip(pred_words, true_words, sums):
        np.add.reduceat(pred, starts, out=pred_sums)
        np.add.reduceat(truth, starts, out=true_sums)
        # only the runs from the first to the last in which both masks have pixels are intersected
        shared = np.logical_and(pred_sums, true_sums).nonzero()[0].tolist()
        first, end = (shared[0], shared[-1] + 1) if shared else (0, 0)
        for run in range(first, end, BLOCK):
            runs = slice(run, min(run + BLOCK, end))
            words = slice(runs.start * RUN, min(runs.stop * RUN, num_words))
            piece = np.bitwise_and(pred[words], truth[words], out=shared_words[: words.stop - words.start])
            np.add.reduceat(piece, starts[: runs.stop - runs.start], out=overlap[runs])
    # each byte of a sum counts one of eight pixels: add neighbouring bytes to four numbers of 16 bits, then those
    every_other = np.uint64(0x00FF00FF00FF00FF)
    sums = (sums & every_other) + (sums >> np.uint64(8) & every_other)
    return sums.view(np.uint16).sum(axis=2, dtype=np.int64).T


def _words(masks: np.ndarray) -> np.ndarray:
    """Bool masks (n, height, width) as uint64 (n, words) of eight pixels each, the last filled up with background."""
    pixels = masks.reshape(len(masks), masks.shape[1] * masks.shape[2])
    if missing := -pixels.shape[1] % 8:
        pixels = np.pad(pixels, ((0, 0), (0, missing)))
    return np.ascontiguousarray(pixels).view(np.uint64)


def _sizes(masks: Sequence[Rle], side: str) -> np.ndarray:
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


def _is_size(size: object) -> bool:
    if not isinstance(size, (list, tuple, np.ndarray)) or len(size) != 2:
        return False
    whole = all(isinstance(side, (int, np.integer)) for side in size)
    return whole and min(size) > 0 and int(size[0]) * int(size[1]) < LARGEST_MASK


def _chunks(predictions: Sequence[Rle], truths: Sequence[Rle], pixels: np.ndarray) -> Iterator[slice]:
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


def _shared_pixels(predictions: Runs, truths: Runs) -> np.ndarray:
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


def _read_runs(masks: Sequence[Rle], sizes: np.ndarray, side: str, offset: int) -> Runs:
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


def _resample(runs: Runs, old: np.ndarray, new: np.ndarray, nearest: str) -> Runs:
    """Bring masks from their `old` sizes to `new` ones, (n, 2) of [height, width], by the nearest pixel."""
    if (old == new).all():
        return runs
    start, end = runs.edges[0::2], runs.edges[1::2]
    has_pixels = end > start
    mask = np.repeat(np.arange(len(old)), runs.num_runs)[has_pixels]
    before = (np.cumsum(old.prod(axis=1)) - old.prod(axis=1))[mask]
    start, end, height = start[has_pixels] - before, end[has_pixels] - before, old[mask, 0]
    # cut each run where a column ends: pieces of one column each
    left, top = np.divmod(start, height)
    right, bottom = np.divmod(end - 1, height)
    num_pieces = right - left + 1
    run = np.repeat(np.arange(len(mask)), num_pieces)
    column = left[run] + np.arange(len(run)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
    top = np.where(column == left[run], top[run], 0)
    bottom = np.where(column == right[run], bottom[run] + 1, height[run])
    mask = mask[run]
    # the new rows and columns that show them
    rows, row_offset = _tables(old[:, 0], new[:, 0], nearest)
    columns, column_offset = _tables(old[:, 1], new[:, 1], nearest)
    top, bottom = rows[row_offset[mask] + top], rows[row_offset[mask] + bottom]
    left, right = (columns[column_offset[mask] + column + edge] for edge in (0, 1))
    copies = np.where(bottom > top, right - left, 0)
    piece = np.repeat(np.arange(len(copies)), copies)
    column = left[piece] + np.arange(len(piece)) - np.repeat(np.cumsum(copies) - copies, copies)
    mask = mask[piece]
    begin = (np.cumsum(new.prod(axis=1)) - new.prod(axis=1))[mask] + column * new[mask, 0]
    edges = np.stack([begin + top[piece], begin + bottom[piece]], axis=1)
    area = np.bincount(mask, edges[:, 1] - edges[:, 0], minlength=len(old))
    return Runs(edges.ravel(), np.bincount(mask, minlength=len(old)), area.astype(np.int64))


def _tables(old: np.ndarray, new: np.ndarray, nearest: str) -> tuple[np.ndarray, np.ndarray]:
    """`_first_shown` of all pairs of lengths end to end, and where the table of each pair begins, int64 (n,)."""
    pairs, pair = np.unique(old * LARGEST_MASK + new, return_inverse=True)  # two lengths as one number
    tables = [_first_shown(*divmod(lengths, LARGEST_MASK), nearest) for lengths in pairs.tolist()]
    starts = np.cumsum([0, *map(len, tables)])[:-1]
    return np.concatenate(tables), starts[pair]


@lru_cache(1024)
def _first_shown(old: int, new: int, nearest: str) -> np.ndarray:
    """How many of `new` pixels show one before each of `old` pixels, int64 (old + 1,).

    "center" takes the pixel under the middle of the new one. "corner" takes the one under its upper left corner, as
    OpenCV's INTER_NEAREST does, with its rounding.
    """
    if nearest == "center":
        source = ((np.arange(new) + 0.5) * old / new).astype(int)
    else:
        source = np.minimum((np.arange(new) * (1 / (new / old))).astype(int), old - 1)
    return np.searchsorted(source, np.arange(old + 1))
