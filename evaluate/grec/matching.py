"""One-to-one matching of predicted and true boxes, for many sentences at once, as the published evaluator does it.

Each step takes the pair that overlaps most and sets its row and column to 0, until the best remaining pair is below
the threshold. Arithmetic is float32 throughout, as in the published code.
"""

from __future__ import annotations

import numpy as np

from .boxes import CELLS, valid_boxes
from .ties import first_of_topk


def count_matches(
    predictions: np.ndarray,
    num_predictions: np.ndarray,
    truths: np.ndarray,
    num_truths: np.ndarray,
    *,
    generalised: bool,
    threshold: float,
    undefined: float = np.nan,
) -> np.ndarray:
    """Number of matched pairs per sentence, int64 (n,).

    Args:
        predictions, truths: float32 boxes x0, y0, x1, y1 of all sentences end to end.
        num_predictions, num_truths: how many belong to each sentence, (n,).
        generalised: compare by generalised IoU (Rezatofighi et al., CVPR 2019) or by plain IoU.
        threshold: least overlap of a matched pair.
        undefined: overlap of two boxes without area; nan, as published, counts as a match.
    """
    matched = np.zeros(len(num_truths), np.int64)
    first_prediction = np.cumsum(num_predictions) - num_predictions
    first_truth = np.cumsum(num_truths) - num_truths
    waiting = np.flatnonzero((num_predictions > 0) & (num_truths > 0))
    waiting = waiting[np.lexsort((num_predictions[waiting], num_truths[waiting]))]
    # sentences with about as many pairs make one array of at most CELLS pairs
    while len(waiting):
        largest = np.maximum.accumulate(num_predictions[waiting]) * np.maximum.accumulate(num_truths[waiting])
        take = max(1, int(np.searchsorted(largest * np.arange(1, len(waiting) + 1), CELLS)))
        chunk, waiting = waiting[:take], waiting[take:]
        rows, is_prediction = _pad(predictions, first_prediction[chunk], num_predictions[chunk])
        columns, is_truth = _pad(truths, first_truth[chunk], num_truths[chunk])
        overlap = overlaps(rows[:, :, None], columns[:, None, :], generalised=generalised)
        overlap[np.isnan(overlap)] = undefined
        overlap[~valid_boxes(rows)] = -np.inf
        overlap[~(is_prediction[:, :, None] & is_truth[:, None, :])] = -np.inf
        matched[chunk] = _match(overlap, num_predictions[chunk], num_truths[chunk], threshold)
    return matched


def overlaps(predictions: np.ndarray, truths: np.ndarray, *, generalised: bool) -> np.ndarray:
    """IoU or generalised IoU of float32 boxes (..., 4) x0, y0, x1, y1; nan where both boxes are without area."""
    pred_low, pred_high = predictions[..., :2], predictions[..., 2:]
    true_low, true_high = truths[..., :2], truths[..., 2:]
    shared = np.minimum(pred_high, true_high) - np.maximum(pred_low, true_low)
    intersection = _area(np.maximum(shared, np.float32(0)))
    union = _area(pred_high - pred_low) + _area(true_high - true_low) - intersection
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        iou = intersection / union
        if not generalised:
            return iou
        hull = _area(np.maximum(pred_high, true_high) - np.minimum(pred_low, true_low))
        return iou - (hull - union) / hull


def _match(overlap: np.ndarray, height: np.ndarray, width: np.ndarray, threshold: float) -> np.ndarray:
    """Greedy matching within each matrix of a stack (n, predictions, truths), -inf beyond its own height and width."""
    most = np.minimum(height, width)
    matched = np.zeros(len(overlap), np.int64)
    active = np.arange(len(overlap))
    for step in range(int(most.max())):
        active = active[most[active] > step]
        flat = overlap[active].reshape(len(active), overlap.shape[1] * overlap.shape[2])
        best = flat.argmax(axis=1)
        value = flat[np.arange(len(active)), best]
        reached = ~(value < np.float32(threshold))  # so nan, two boxes without area, is a match
        equal = (flat == value[:, None]) | (np.isnan(flat) & np.isnan(value)[:, None])
        tied = reached & (np.count_nonzero(equal, axis=1) > 1)
        # which of equal pairs is taken decides what is left for the others; of pairs of overlap 0 none has a partner
        for index in np.flatnonzero(tied & (value != 0)):
            sentence = active[index]
            pairs = overlap[sentence, : height[sentence], : width[sentence]]
            row, column = divmod(first_of_topk(pairs.ravel().tolist()), pairs.shape[1])
            best[index] = row * overlap.shape[2] + column
        active, best = active[reached], best[reached]
        matched[active] += 1
        # the published code sets used pairs to 0, so from a threshold of 0 down they match again
        for used in (np.s_[active, best // overlap.shape[2], :], np.s_[active, :, best % overlap.shape[2]]):
            overlap[used] = np.where(np.isneginf(overlap[used]), -np.inf, 0)
    return matched


def _pad(boxes: np.ndarray, first: np.ndarray, number: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Boxes as (sentences, largest number, 4), and whether each is a box or padding."""
    place = np.arange(number.max())
    is_box = place < number[:, None]
    return boxes[np.where(is_box, first[:, None] + place, 0)], is_box


def _area(sides: np.ndarray) -> np.ndarray:
    return sides[..., 0] * sides[..., 1]
