"""Which of several equally good pairs the published evaluator takes.

It asks `torch.topk(pairs, 1)`, which on CPU leaves ties to the C++ library: from 64 pairs on the first is taken, below
that `std::nth_element` decides, whose steps (GNU libstdc++: median of three, partition, then the first of the three or
fewer left) are followed here so that ties end alike. nan counts as the largest value.
"""

from __future__ import annotations

from math import isnan

SELECTED_BY_HEAP = 64


def first_of_topk(values: list[float]) -> int:
    """Index of the value that `torch.topk(values, 1)` returns on CPU."""
    items = list(enumerate(values))
    last = len(items)
    if last >= SELECTED_BY_HEAP:
        return _first_largest(items)
    for _ in range(2 * (last.bit_length() - 1)):
        if last <= 3:
            break
        _median_to_front(items, last)
        last = _partition(items, last)
    return _first_largest(items[:last])


def _first_largest(items: list[tuple[int, float]]) -> int:
    best = items[0]
    for item in items[1:]:
        if _before(item, best):
            best = item
    return best[0]


def _median_to_front(items: list[tuple[int, float]], last: int) -> None:
    low, middle, high = sorted_ = 1, last // 2, last - 1
    a, b, c = (items[i] for i in sorted_)
    if _before(a, b):
        median = middle if _before(b, c) else high if _before(a, c) else low
    else:
        median = low if _before(a, c) else high if _before(b, c) else middle
    items[0], items[median] = items[median], items[0]


def _partition(items: list[tuple[int, float]], last: int) -> int:
    """Larger values before smaller ones, around the first; returns where the smaller begin."""
    pivot, low, high = items[0], 1, last
    while True:
        while _before(items[low], pivot):
            low += 1
        high -= 1
        while _before(pivot, items[high]):
            high -= 1
        if low >= high:
            return low
        items[low], items[high] = items[high], items[low]
        low += 1


def _before(one: tuple[int, float], other: tuple[int, float]) -> bool:
    return (isnan(one[1]) and not isnan(other[1])) or one[1] > other[1]
