"""Boxes and their one-to-one matching, shared by MDETR and the instance branch of ReLA."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

NON_FINITE_COST = 1e6  # replaces a matching cost that is nan or infinite


class Matches(NamedTuple):
    """Matched pairs of queries and targets of a batch, (pairs,) each."""

    sample: torch.Tensor  # position in the batch
    query: torch.Tensor
    target: torch.Tensor


def cxcywh_to_xyxy(boxes: torch.Tensor) -> torch.Tensor:
    """(..., 4) centre x, centre y, width, height -> (..., 4) x0, y0, x1, y1."""
    centre, size = boxes.split(2, dim=-1)
    return torch.cat([centre - size / 2, centre + size / 2], dim=-1)


def xywh_to_xyxy(boxes: torch.Tensor) -> torch.Tensor:
    """(..., 4) left, top, width, height -> (..., 4) x0, y0, x1, y1."""
    top_left, size = boxes.split(2, dim=-1)
    return torch.cat([top_left, top_left + size], dim=-1)


def generalized_iou(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Generalised IoU of xyxy boxes, (..., 4) x 2 that broadcast -> (...)."""
    inner = _area(torch.maximum(first[..., :2], second[..., :2]), torch.minimum(first[..., 2:], second[..., 2:]))
    outer = _area(torch.minimum(first[..., :2], second[..., :2]), torch.maximum(first[..., 2:], second[..., 2:]))
    union = _area(first[..., :2], first[..., 2:]) + _area(second[..., :2], second[..., 2:]) - inner
    return inner / union - (outer - union) / outer


def match_costs(costs: torch.Tensor, counts: torch.Tensor) -> Matches:
    """The cheapest one-to-one pairs of queries and targets of each sample.

    Costs that are not finite count as very large: such a query is matched last. A diverged model is noticed by its
    loss, which is not finite either.

    Args:
        costs: (batch, queries, targets).
        counts: (batch,) how many of the targets are real, the others are padding.

    Returns:
        the pairs sample by sample, queries ascending.
    """
    finite = costs.cpu().double().nan_to_num(nan=NON_FINITE_COST, posinf=NON_FINITE_COST, neginf=NON_FINITE_COST)
    return Matches(*_pairs(finite.numpy(), counts.tolist()).to(costs.device))


def match_layers(costs: Sequence[torch.Tensor], counts: torch.Tensor) -> list[Matches]:
    """`match_costs` of each of several layers, with one copy from the device and one to it."""
    finite = torch.stack(list(costs)).double().nan_to_num(NON_FINITE_COST, NON_FINITE_COST, NON_FINITE_COST)
    numbers = counts.tolist()
    pairs = [_pairs(layer, numbers) for layer in finite.cpu().numpy()]
    moved = torch.cat(pairs, dim=1).to(counts.device, non_blocking=True)
    return [Matches(*part) for part in moved.split([layer.shape[1] for layer in pairs], dim=1)]


def _pairs(costs: np.ndarray, counts: Sequence[int]) -> torch.Tensor:
    """The samples, queries and targets of the cheapest pairs of (batch, queries, targets): (3, pairs)."""
    parts: list[np.ndarray] = []  # (3, pairs) each
    for i, (cost, count) in enumerate(zip(costs, counts, strict=True)):
        queries, targets = assign(cost[:, :count])
        parts.append(np.stack([np.full(len(queries), i), queries, targets]))
    return torch.from_numpy(np.concatenate(parts, axis=1))


def assign(cost: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cheapest one-to-one assignment of a (rows, columns) cost matrix: the rows, ascending, and their columns.

    Shortest augmenting paths (Jonker and Volgenant 1987; Crouse 2016), one row at a time. Row and column prices keep
    every reduced cost, `cost - row price - column price`, at 0 or above, and at 0 for assigned pairs.
    """
    if cost.shape[0] > cost.shape[1]:
        columns, rows = assign(cost.T)
        order = rows.argsort()
        return rows[order], columns[order]
    row_price, column_price = np.zeros(cost.shape[0]), np.zeros(cost.shape[1])
    row_of, column_of = np.full(cost.shape[1], -1), np.full(cost.shape[0], -1)  # -1: not assigned
    for start in range(cost.shape[0]):
        # Dijkstra from row `start` over reduced costs, until the nearest column is a free one.
        length, before = np.full(cost.shape[1], np.inf), np.full(cost.shape[1], -1)  # of the shortest path to a column
        done = np.zeros(cost.shape[1], dtype=bool)
        row, least = start, 0.0
        while row >= 0:
            step = least + cost[row] - row_price[row] - column_price
            shorter = ~done & (step < length)
            length[shorter], before[shorter] = step[shorter], row
            column = np.where(done, np.inf, length).argmin()
            done[column], least, row = True, length[column], row_of[column]
        # Prices of the visited rows and columns, so that reduced costs along the path become 0.
        inner = row_of[done & (row_of >= 0)]
        row_price[start] += least
        row_price[inner] += least - length[column_of[inner]]
        column_price[done] -= least - length[done]
        # Walk the path back to its start and reassign each row on it.
        while row != start:
            row = before[column]
            row_of[column], column_of[row], column = row, column, column_of[row]
    return np.arange(cost.shape[0]), column_of


def mean_count(counts: torch.Tensor) -> torch.Tensor:
    """Sum of `counts` averaged over the processes of a distributed run, as gradients are; at least 1."""
    return mean_over_processes(counts.sum().float()).clamp(min=1)


def mean_over_processes(total: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over the processes of a distributed run; all of them must call this together.

    A sum divided by it, averaged over the processes as gradients are, is the value of one process with all samples.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        total = total.clone()
        torch.distributed.all_reduce(total)
        total = total / torch.distributed.get_world_size()
    return total


def _area(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return (high - low).clamp(min=0).prod(-1)
