"""Exact one-dimensional k-means: of all ways to cut sorted values into k runs, the one with the least squared error.

    D_1[j] = cost(0, j)        D_m[j] = min_i D_{m-1}[i] + cost(i, j)        D_k[n] is the least error

where cost(i, j) is the weighted squared distance of values i to j-1 from their mean, which three prefix sums give. The
best i grows with j (the cost obeys the quadrangle inequality), so that once the best cut for every second j is known,
those between have to look only between their neighbours' cuts: every halving costs O(n), a whole layer O(n log n). A
compiled kernel does this row by row (kmeans.cpp); without a compiler, all rows are halved at once in numpy, with the
same result some thirty times later.

Worked example, k = 2: 1, 2, 6, 8. D_1 = 0, 0, .5, 14, 32.75; the best last run of all four begins at 6: .5 + 2 = 2.5,
so that the centres are 1.5 and 7.

Source: Wang, Song 2011, "Ckmeans.1d.dp: optimal k-means clustering in one dimension by dynamic programming"; Gronlund
et al. 2017, "Fast exact k-means, k-medians and Bregman divergence clustering in 1D" (arXiv:1701.07204).
"""

from __future__ import annotations

import ctypes

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from penjing.compiled import helper

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

_AT_ONCE = 1 << 18
"""Values whose rows are solved together: what they need stays in the cache."""


def exact_kmeans(values: Tensor, importance: Tensor | None, count: int) -> Tensor:
    """The `count` centres of every row of `values` (R, n) with the least weighted squared error: fp64 (R, count),
    rising.

    importance  (R, n) or (n,), not negative: what an error at this value costs; None: the same everywhere

    A row with fewer distinct values repeats its last centre.
    """
    rows, columns = values.shape
    weights = torch.ones(()) if importance is None else importance
    weights = weights.double().expand(rows, columns)
    sorted_values, order = values.double().sort(1)
    weights = weights.gather(1, order)
    height = max(1, _AT_ONCE // max(columns, 1))
    centres = [
        _centres(sorted_values[row : row + height].numpy(), weights[row : row + height].numpy(), count)
        for row in range(0, rows, height)
    ]
    return torch.from_numpy(np.concatenate(centres))


def _centres(values: Floats, weights: Floats, count: int) -> Floats:
    middle = values.mean(1, keepdims=True)
    values = values - middle  # smaller numbers, smaller rounding errors
    library = helper("kmeans.cpp", "penjing.numerics")
    ends = _solve(values, weights, count) if library is None else _solve_fast(library, values, weights, count)
    return _means(values, weights, _leading(ends)) + middle


def _solve_fast(library: ctypes.CDLL, values: Floats, weights: Floats, count: int) -> Indices:
    rows, columns = values.shape
    ends = np.empty((rows, count), dtype=np.int64)
    pointers = [ctypes.c_void_p(array.ctypes.data) for array in (values, weights, ends)]
    sizes = [ctypes.c_int64(size) for size in (rows, columns, count)]
    library.exact_kmeans(*pointers[:2], *sizes, pointers[2], ctypes.c_int(torch.get_num_threads()))
    return ends


def _means(values: Floats, weights: Floats, ends: Indices) -> Floats:
    """Centres (R, k) of the runs that stop at `ends` (R, k); one without weight has the centre before it."""
    padded = [np.pad(array.cumsum(1), ((0, 0), (1, 0))) for array in (weights, weights * values)]
    weight, first = (np.diff(np.take_along_axis(total, ends, 1), axis=1, prepend=0) for total in padded)
    means = first / np.where(weight > 0, weight, 1)
    for place in range(1, means.shape[1]):
        means[:, place] = np.where(weight[:, place] > 0, means[:, place], means[:, place - 1])
    return means


class _Costs:
    """Cost of any run of any row, from prefix sums (R, n + 1) of weights, weighted values and their squares."""

    def __init__(self, values: Floats, weights: Floats) -> None:
        self.rows, self.columns = values.shape
        self.sums = [_prefix(weights * power) for power in (np.ones_like(values), values, values * values)]

    def of(self, row: Indices, start: Indices, stop: Indices) -> Floats:
        """Squared error of values `start` to `stop` - 1 of `row`, all flat."""
        base = row * (self.columns + 1)
        weight, first, second = (total[base + stop] - total[base + start] for total in self.sums)
        return np.maximum(second - first * first / np.where(weight > 0, weight, 1), 0)


def _prefix(values: Floats) -> Floats:
    return np.pad(values.cumsum(1), ((0, 0), (1, 0))).ravel()


def _solve(values: Floats, weights: Floats, count: int) -> Indices:
    """Where each run of each row stops, (R, k)."""
    costs = _Costs(values, weights)
    rows, columns = values.shape
    row, stop = np.divmod(np.arange(rows * (columns + 1)), columns + 1)
    least = costs.of(row, np.zeros_like(stop), stop)
    cuts_of = []
    for _ in range(1, count):
        least, best = _layer(costs, least)
        cuts_of.append(best.astype(np.int32))
    ends = np.full((rows, count), columns, dtype=np.int64)
    for place in range(count - 1, 0, -1):
        ends[:, place - 1] = cuts_of[place - 1][np.arange(rows), ends[:, place]]
    return ends


def _leading(ends: Indices) -> Indices:
    """The same runs with empty ones last."""
    full = np.diff(ends, axis=1, prepend=0) > 0
    ends = np.take_along_axis(ends, np.argsort(~full, axis=1, kind="stable"), 1)
    return np.where(np.arange(ends.shape[1]) < full.sum(1, keepdims=True), ends, ends[:, -1:].max(1, keepdims=True))


def _layer(costs: _Costs, before: Floats) -> tuple[Floats, Indices]:
    """D_m, flat, and the best cut (R, n + 1) of every prefix, from D_{m-1}."""
    rows, positions = costs.rows, costs.columns + 1
    best = np.zeros((rows, positions), dtype=np.int64)
    least = np.empty((rows, positions))
    step = 1 << (positions - 1).bit_length()
    _halve(costs, before, best, least, np.array([0]), step)
    while step := step // 2:
        _halve(costs, before, best, least, np.arange(step, positions, 2 * step), step)
    return least.ravel(), best


def _halve(costs: _Costs, before: Floats, best: Indices, least: Floats, places: Indices, step: int) -> None:
    """Find the cuts at `places`, whose neighbours `step` away are known."""
    rows, positions = best.shape
    low = best[:, np.maximum(places - step, 0)]
    after = places + step
    high = np.where(after < positions, best[:, np.minimum(after, positions - 1)], positions - 1)
    high = np.minimum(high, places)
    counts = (high - low + 1).ravel()
    begins = np.concatenate([[0], counts.cumsum()])
    start = np.arange(begins[-1]) - np.repeat(begins[:-1] - low.ravel(), counts)
    row = np.repeat(np.repeat(np.arange(rows), len(places)), counts)
    total = before[row * positions + start] + costs.of(row, start, np.repeat(np.tile(places, rows), counts))
    smallest = np.minimum.reduceat(total, begins[:-1])
    hits = np.flatnonzero(total == np.repeat(smallest, counts))
    first = hits[np.searchsorted(hits, begins[:-1])]
    best[:, places] = start[first].reshape(rows, -1)
    least[:, places] = smallest.reshape(rows, -1)
