"""Masks as COCO run-length strings, and how much two of them overlap, without ever painting one.

A COCO string holds the lengths of alternating background and foreground runs, column by column. Whole batches are read
at once with numpy: every mask of a batch sums to its height x width, so one running sum over the batch puts prediction
and truth on the same axis, and the overlap is a piecewise linear function read off at the ends of the runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypedDict

import numpy as np
from pycocotools import mask as coco

if TYPE_CHECKING:
    import torch

CHUNK = 64  # pairs read at once: their run lengths stay in a processor's cache
RUN = 255  # words of eight pixels added up at once: a byte holds as many
BLOCK = 32  # runs intersected at once, in 64 KiB that are used again: fresh memory costs more than counting


class Rle(TypedDict):
    """A COCO run-length mask: `size` is [height, width] in pixels, `counts` the compressed string (str or bytes)."""

    size: Sequence[int]
    counts: str | bytes


def encode(mask: np.ndarray | torch.Tensor) -> Rle:
    """One mask (height, width) of bool or 0/1, numpy or torch, as `{"size": [height, width], "counts": str}`."""
    pixels = np.asarray(mask if isinstance(mask, np.ndarray) else mask.numpy(force=True))
    if pixels.ndim != 2:
        raise ValueError(f"a mask is (height, width), this one is {pixels.shape}: encode a batch one by one")
    rle = coco.encode(np.asfortranarray(pixels != 0, dtype=np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode()}


def foreground(logits: np.ndarray | torch.Tensor) -> np.ndarray | torch.Tensor:
    """Two-channel logits (..., 2, height, width) to bool masks: the published argmax, a tie being background."""
    background, target = logits[..., 0, :, :], logits[..., 1, :, :]
    if isinstance(logits, np.ndarray) or logits.device.type != "cpu" or logits.dtype.itemsize < 4:
        return target > background
    import torch

    # numpy compares five times faster than torch does on a CPU
    return torch.from_numpy(np.asarray(target.numpy(force=True) > background.numpy(force=True)))


def resize(rles: Sequence[Rle], sizes: Sequence[Sequence[int]], side: str) -> list[Rle]:
    """Each mask brought to its [height, width] by nearest pixel centre; a mask of that size is untouched."""
    for start in range(0, len(rles), CHUNK):
        _read_runs(rles[start : start + CHUNK], side, start)  # refuses what would crash or hang the C code
    return [
        rle if list(rle["size"]) == list(size) else encode(_sample(coco.decode(_as_bytes(rle)), *size))
        for rle, size in zip(rles, sizes)
    ]


def rle_overlaps(predictions: Sequence[Rle], truths: Sequence[Rle]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixel counts of each pair: (intersection, union, predicted area), int64 arrays of length n.

    Raises ValueError for a mask whose string is broken or does not fill its size, and for pairs of unlike sizes.
    """
    for index, (prediction, truth) in enumerate(zip(predictions, truths, strict=True)):
        if list(prediction["size"]) != list(truth["size"]):
            raise ValueError(
                f"prediction {index} is {list(prediction['size'])} and its reference {list(truth['size'])} (height, "
                'width): predict at the reference\'s size, or choose a common one with resolution="original" or 480'
            )
    chunks = range(0, len(predictions), CHUNK)
    counts = [_overlaps(predictions[i : i + CHUNK], truths[i : i + CHUNK], i) for i in chunks]
    intersection, predicted, truth = np.concatenate([np.zeros((3, 0), np.int64), *counts], axis=1)
    return intersection, predicted + truth - intersection, predicted


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
    both = np.empty(BLOCK * RUN, np.uint64)
    for pred, truth, (overlap, pred_sums, true_sums) in zip(pred_words, true_words, sums):
        np.add.reduceat(pred, starts, out=pred_sums)
        np.add.reduceat(truth, starts, out=true_sums)
        shared = np.logical_and(pred_sums, true_sums).nonzero()[0].tolist()
        first, end = (shared[0], shared[-1] + 1) if shared else (0, 0)
        for run in range(first, end, BLOCK):
            runs = slice(run, min(run + BLOCK, end))
            words = slice(runs.start * RUN, min(runs.stop * RUN, num_words))
            piece = np.bitwise_and(pred[words], truth[words], out=both[: words.stop - words.start])
            np.add.reduceat(piece, starts[: runs.stop - runs.start], out=overlap[runs])
    every_other = np.uint64(0x00FF00FF00FF00FF)
    sums = (sums & every_other) + (sums >> np.uint64(8) & every_other)  # four numbers of 16 bits each
    return sums.view(np.uint16).sum(axis=2, dtype=np.int64).T


def _words(masks: np.ndarray) -> np.ndarray:
    """Bool masks (n, height, width) as uint64 (n, words) of eight pixels each, the last filled up with background."""
    pixels = masks.reshape(len(masks), masks.shape[1] * masks.shape[2])
    if missing := -pixels.shape[1] % 8:
        pixels = np.pad(pixels, ((0, 0), (0, missing)))
    return np.ascontiguousarray(pixels).view(np.uint64)


def _overlaps(predictions: Sequence[Rle], truths: Sequence[Rle], offset: int) -> np.ndarray:
    """Intersection, predicted and true area of each pair, int64 (3, n)."""
    pred_runs, pred_first = _read_runs(predictions, "prediction", offset)
    true_runs, true_first = _read_runs(truths, "reference", offset)
    true_ends = np.cumsum(true_runs)
    true_area = np.repeat(np.cumsum(true_runs[:, 0]), 2)  # grows along a foreground run, rests along the background
    pred_ends = np.cumsum(pred_runs).reshape(-1, 2)
    pred_ends[:, 1] = pred_ends[:, 0] - pred_runs[:, 0]
    covered = np.interp(pred_ends, true_ends, true_area)  # exact: slopes are 0 or 1, values below 2**53
    both = (covered[:, 0] - covered[:, 1]).astype(np.int64)
    pairs = (both, pred_first), (pred_runs[:, 0], pred_first), (true_runs[:, 0], true_first)
    return np.stack([np.add.reduceat(pixels, first) for pixels, first in pairs])


def _read_runs(rles: Sequence[Rle], side: str, offset: int) -> tuple[np.ndarray, np.ndarray]:
    """All runs of a batch, int64 (rows, 2) of foreground then background pixels, and each mask's first row.

    A mask begins with background: its first row is (0, first run).
    """
    strings = [_as_bytes(rle)["counts"] for rle in rles]
    lengths = np.array([len(string) for string in strings])
    codes = np.frombuffer(b"".join(strings), np.uint8) - np.uint8(48)  # 5 bits each, lowest first; 32: more follow
    last = np.cumsum(lengths) - 1
    _refuse(lengths == 0, rles, side, offset, "is empty")
    if codes.max() > 63 or codes[last].max() > 31:
        broken = np.array([max(code) > 63 or code[-1] > 31 for code in np.split(codes, last[:-1] + 1)])
        _refuse(broken, rles, side, offset, "is no RLE string")
    ends = np.flatnonzero(codes < 32)
    last_run = np.searchsorted(ends, last)
    values = _join_digits(codes, ends)
    num_runs = np.diff(last_run, prepend=-1)
    num_rows = num_runs // 2 + 1
    first_row = np.cumsum(num_rows) - num_rows
    runs = np.zeros((num_rows.sum(), 2), np.int64)
    places = np.arange(len(values)) + np.repeat(2 * first_row + num_runs - last_run, num_runs)
    runs.reshape(-1)[places] = values
    # from its third row on, a string stores each run less the one a row above
    total = np.cumsum(runs, axis=0)
    total -= np.repeat(total[first_row], num_rows, axis=0)
    total[first_row] = runs[first_row]
    total[(first_row + num_rows - 1)[num_runs % 2 == 0], 1] = 0  # an even string ends with foreground
    _refuse(np.minimum.reduceat(total.ravel(), 2 * first_row) < 0, rles, side, offset, "has a run of negative length")
    pixels = [int(rle["size"][0]) * int(rle["size"][1]) for rle in rles]
    _refuse(np.add.reduceat(total.ravel(), 2 * first_row) != pixels, rles, side, offset, "does not fill its size")
    return total, first_row


def _join_digits(codes: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Signed numbers whose 5-bit digits, lowest first, end at the given codes."""
    digits = np.diff(ends, prepend=-1)
    values = ((codes[ends] & 31).astype(np.int64) ^ 16) - 16
    longer = np.flatnonzero(digits > 1)
    for place in range(1, digits.max()):
        values[longer] = values[longer] * 32 + (codes[ends[longer] - place] & 31)
        longer = longer[digits[longer] > place + 1]
    return values


def _refuse(bad: np.ndarray, rles: Sequence[Rle], side: str, offset: int, fault: str) -> None:
    if bad.any():
        index = int(np.argmax(bad))
        rle = rles[index]
        raise ValueError(
            f"the mask of {side} {offset + index} {fault}: size {list(rle['size'])}, counts {rle['counts'][:40]!r}; "
            "encode masks with metric.encode or pycocotools.mask.encode"
        )


def _as_bytes(rle: Rle) -> Rle:
    counts = rle["counts"]
    if isinstance(counts, str):
        counts = counts.encode("ascii", "replace")
    if not isinstance(counts, bytes):
        raise ValueError(f"RLE counts must be the compressed COCO string, not {type(counts).__name__}: see encode")
    return {"size": [int(side) for side in rle["size"]], "counts": counts}


def _sample(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    rows = ((np.arange(height) + 0.5) * pixels.shape[0] / height).astype(int)
    columns = ((np.arange(width) + 0.5) * pixels.shape[1] / width).astype(int)
    return pixels[rows[:, None], columns]
