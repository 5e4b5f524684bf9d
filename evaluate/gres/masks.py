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
    return logits[..., 1, :, :] > logits[..., 0, :, :]


def resize(rles: Sequence[Rle], sizes: Sequence[Sequence[int]]) -> list[Rle]:
    """Each mask brought to its [height, width] by nearest pixel centre; a mask of that size is untouched."""
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
                'width): predict at the reference\'s size, or choose a common one with resolution="original" or '
                "resolution=480"
            )
    if not predictions:
        return (np.zeros(0, np.int64),) * 3
    pred_runs, pred_first, pred_on = _read_runs(predictions, "prediction")
    true_runs, true_first, true_on = _read_runs(truths, "reference")
    pred_ends = np.cumsum(pred_runs)
    true_ends = np.concatenate([[0], np.cumsum(true_runs)])
    true_area = np.concatenate([[0], np.cumsum(true_runs * true_on)])
    covered = np.interp(pred_ends, true_ends, true_area)  # exact: slopes are 0 or 1, values stay below 2**53
    intersection = np.add.reduceat(np.diff(covered, prepend=0) * pred_on, pred_first).astype(np.int64)
    predicted = np.add.reduceat(pred_runs * pred_on, pred_first)
    truth = np.add.reduceat(true_runs * true_on, true_first)
    return intersection, predicted + truth - intersection, predicted


def dense_overlaps(
    predictions: np.ndarray | torch.Tensor, truths: np.ndarray | torch.Tensor
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixel counts of bool masks (n, height, width): (intersection, union, predicted area), int64 arrays of length n.

    Tensors are counted on their own device and only the counts are copied.
    """
    if isinstance(predictions, np.ndarray):
        pairs = zip(predictions, truths, strict=True)
        counts = np.array([_count(prediction, truth) for prediction, truth in pairs], np.int64).reshape(-1, 3)
    else:
        both = (predictions & truths).sum((-2, -1))
        areas = predictions.sum((-2, -1)), truths.sum((-2, -1))
        counts = np.stack([count.numpy(force=True) for count in (both, *areas)], axis=1)
    intersection, predicted, truth = counts.T
    return intersection, predicted + truth - intersection, predicted


def _count(prediction: np.ndarray, truth: np.ndarray) -> tuple[int, int, int]:
    both = np.count_nonzero(prediction & truth)
    return both, np.count_nonzero(prediction), np.count_nonzero(truth)


def _read_runs(rles: Sequence[Rle], side: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All runs of a batch end to end: lengths in pixels, index of each mask's first run, 1 where foreground."""
    strings = [_as_bytes(rle)["counts"] for rle in rles]
    lengths = np.array([len(string) for string in strings])
    _refuse(lengths == 0, rles, side, "has no counts")
    codes = np.frombuffer(b"".join(strings), np.uint8).astype(np.int64) - 48
    first_code = np.cumsum(lengths) - lengths
    _refuse(np.logical_or.reduceat((codes < 0) | (codes > 63), first_code), rles, side, "has stray characters")
    ends = np.flatnonzero(codes < 32)  # 5 bits a character, lowest first; bit 5 says that more follow
    _refuse(codes[first_code + lengths - 1] >= 32, rles, side, "is cut short")
    digits = np.diff(ends, prepend=-1)
    first_run = np.searchsorted(ends, first_code)
    _refuse(np.maximum.reduceat(digits, first_run) > 7, rles, side, "has a run of more than 35 bits")
    place = 5 * (np.arange(len(codes)) - np.repeat(ends - digits + 1, digits))
    runs = np.add.reduceat((codes & 31) << place, ends - digits + 1)
    runs -= ((codes[ends] & 16) > 0) * (1 << 5 * digits)
    rank = np.arange(len(runs)) - np.repeat(first_run, np.diff(first_run, append=len(runs)))
    _undo_differences(runs, rank)
    _refuse(np.minimum.reduceat(runs, first_run) < 0, rles, side, "has a run of negative length")
    pixels = np.array([int(rle["size"][0]) * int(rle["size"][1]) for rle in rles])
    _refuse(np.add.reduceat(runs, first_run) != pixels, rles, side, "does not fill its size")
    return runs, first_run, rank & 1


def _undo_differences(runs: np.ndarray, rank: np.ndarray) -> None:
    """In place: from its fourth run on, a mask's string stores each run less the run two before."""
    for parity in (1, 2):
        chain = np.flatnonzero((rank > 0) & (rank % 2 == parity % 2))
        first = rank[chain] == parity
        total = np.cumsum(runs[chain])
        before = (total - runs[chain])[first]
        runs[chain] = total - np.repeat(before, np.diff(np.flatnonzero(first), append=len(chain)))


def _refuse(bad: np.ndarray, rles: Sequence[Rle], side: str, fault: str) -> None:
    if bad.any():
        index = int(np.argmax(bad))
        rle = rles[index]
        raise ValueError(
            f"the mask of {side} {index} {fault}: size {list(rle['size'])}, counts {rle['counts'][:40]!r}; "
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
