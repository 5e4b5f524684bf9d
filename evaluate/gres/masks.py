"""How much two masks overlap: run lengths are counted without painting any, arrays as words of eight pixels."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from .run_lengths import LARGEST_MASK, Rle, Runs, chunks, mask_sizes, read_runs, shared_pixels

if TYPE_CHECKING:
    import torch

RUN = 255  # words of eight pixels added up at once: a byte holds as many
BLOCK = 32  # runs of words intersected at once, in 64 KiB that are used again: fresh memory costs more than counting


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
    pred_sizes, true_sizes = mask_sizes(predictions, "prediction"), mask_sizes(truths, "reference")
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
    for part in chunks(predictions, truths, largest):
        both = []
        for masks, old, side in ((predictions, pred_sizes, "prediction"), (truths, true_sizes, "reference")):
            runs = read_runs(masks[part], old[part], side, part.start)
            both.append(_resample(runs, old[part], sizes[part], nearest))
        counts.append([shared_pixels(*both), both[0].area, both[1].area])
    intersection, predicted, truth = np.concatenate([np.zeros((3, 0), np.int64), *counts], axis=1)
    return intersection, predicted + truth - intersection, predicted


def num_pixels(truths: Sequence[Rle], resolution: int | str | None) -> np.ndarray:
    """Pixels of the size at which each pair is compared, int64 (n,)."""
    if resolution in (None, "original"):
        return mask_sizes(truths, "reference").prod(axis=1)
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
