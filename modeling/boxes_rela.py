"""Boxes and their one-to-one assignment, as MDETR and the instance branch of ReLA share them."""

import numpy as np
import torch


def assign(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cheapest one-to-one assignment of a (rows, columns) cost matrix: the rows, ascending, and their columns.

    Shortest augmenting paths (Jonker and Volgenant 1987; Crouse 2016), one row at a time.
    """
    if cost.shape[0] > cost.shape[1]:
        columns, rows = assign(cost.T)
        order = rows.argsort()
        return rows[order], columns[order]
    row_price, column_price = np.zeros(cost.shape[0]), np.zeros(cost.shape[1])
    row_of, column_of = np.full(cost.shape[1], -1), np.full(cost.shape[0], -1)
    for start in range(cost.shape[0]):
        length, before = np.full(cost.shape[1], np.inf), np.full(cost.shape[1], -1)  # of the shortest path to a column
        done = np.zeros(cost.shape[1], dtype=bool)
        row, least = start, 0.0
        while row >= 0:
            step = least + cost[row] - row_price[row] - column_price
            shorter = ~done & (step < length)
            length[shorter], before[shorter] = step[shorter], row
            column = np.where(done, np.inf, length).argmin()
            done[column], least, row = True, length[column], row_of[column]
        inner = row_of[done & (row_of >= 0)]
        row_price[start] += least
        row_price[inner] += least - length[column_of[inner]]
        column_price[done] -= least - length[done]
        while row != start:
            row = before[column]
            row_of[column], column_of[row], column = row, column, column_of[row]
    return np.arange(cost.shape[0]), column_of


def corners(boxes: torch.Tensor) -> torch.Tensor:
    """(..., 4) cxcywh -> xyxy."""
    centre, size = boxes.split(2, dim=-1)
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def generalized_iou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Generalised IoU of xyxy boxes, (..., 4) x 2 that broadcast -> (...)."""
    inner = _area(torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:]))
    outer = _area(torch.minimum(first[..., :2], second[..., :2]), torch.maximum(first[..., 2:], second[..., 2:]))
    union = _area(first[..., :2], first[..., 2:]) + _area(second[..., :2], second[..., 2:]) - inner
    return inner / union - (outer - union) / outer


def mean_number(counts: torch.Tensor) -> torch.Tensor:
    """Sum of `counts`, at least one; averaged over the processes of a distributed run, as gradients are."""
    total = counts.sum().float()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
        total = total / torch.distributed.get_world_size()
    return total.clamp(min=1)


def _area(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return (high - low).clamp(min=0).prod(-1)
