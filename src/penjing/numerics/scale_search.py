"""Scales and zero points that lose the least where it matters, found by trying.

The named rules of `penjing.numerics.grids` look at the largest weight only. Here a group w (n,) gets the scale s and
zero point z with the smallest

    loss(s, z) = d M d^T        d = w - s (q - z)        q = encode(w, s, z)

where the metric M says what an error costs: diag(h) with h the mean square of each input, or the block of the Gram
matrix that belongs to the group. Candidates are

    symmetric    s = +-c m, m = max|w|: from 0.4 of the rule `full` to where m meets the last code; weights whose error
                 costs nothing do not count
    asymmetric   every pair of fractions, 0.3 to 1, of the smallest and the largest weight as the ends of the range
    iq4_nl       as symmetric, m / 127 in the place of m over the last code

and the result of the named rule itself. The best is then refined in turns: codes fixed, the loss is quadratic in s and
s z, so both have a closed form; then the weights are encoded anew. Candidates are rounded to what is stored before they
are judged, and only one that loses less is taken, so the result never loses more than the named rule. Where the metric
is diagonal, a compiled kernel picks the cheapest candidate (scale_search.cpp); elsewhere, and without a compiler, they
are tried one by one.

Worked example: w = [1.0, 0.9, -0.1], 2 bits (codes -2 to 1), h = [1, 1, 1]. The rule `full` gives s = 1 / 1.5 = 0.67
and w_hat = [0.67, 0.67, 0], loss 0.17. With s = 1 the codes are [1, 1, 0] and w_hat = [1, 1, 0], loss 0.02. The least
squares for these codes are s = (1.0 + 0.9) / 2 = 0.95 with w_hat = [0.95, 0.95, 0], loss 0.015.

Trying scales around the largest weight, judged by the mean squares of the inputs, is how llama.cpp quantises with an
importance matrix.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from penjing.compiled import helper
from penjing.numerics.float_grids import FloatGrid, ScaledGrid
from penjing.numerics.grids import Grid, IntegerGrid

ScaleSearch = Literal["none", "weights", "diagonal", "gram"]
"""What candidates are judged by: nothing is searched, errors of the weights as they are, weighed by the mean squares of
the inputs, or by the group's Gram matrix."""

ROWS_AT_ONCE = 1024
"""Keeps what a candidate needs in the cache; rows do not affect each other."""

SMALLEST, SCALES, ENDS, REFINEMENTS = 0.4, 32, 8, 3
"""Least fraction of the widest scale, scales of each sign, ends of each side of a range, closed-form rounds."""


def metric_of_sweep(gram: Tensor, factor: Tensor, visited: Tensor, search: ScaleSearch) -> Tensor | None:
    """What a search judges by when later columns make up for errors (see `numerics.sweep`).

    gram     (K, K), what errors cost when nothing makes up for them: the metric of search `gram`
    factor   U of the inverse, columns in the order `visited`. An error e of a column ends up as (e / U[i, i])^2 in the
             loss, whatever comes after it: 1 / U[i, i]^2 is the metric (K,) of search `diagonal`
    """
    if search == "weights":
        return torch.ones(len(gram))
    if search != "diagonal":
        return gram if search == "gram" else None
    return torch.empty(len(gram), dtype=factor.dtype).index_copy_(0, visited, factor.diagonal().reciprocal().square())


def searchable(grid: ScaledGrid) -> bool:
    """Whether scales of `grid` may be any number, so that there is something to look for."""
    return isinstance(grid, IntegerGrid) or grid.element == "iq4_nl"


def free_scales(grid: Grid | None) -> bool:
    """Whether every scale on `grid` may be any number by itself, or, where scales are whole numbers times one number
    per super-block, that one may."""
    plain = isinstance(grid, FloatGrid) and grid.scale == "plain" and grid.tile_rows == 1
    return (isinstance(grid, IntegerGrid) or plain) and grid is not None and grid.group_size != "tensor"


def part_of(metric: Tensor | None, columns: Tensor | slice) -> Tensor | None:
    """The metric of some of the columns."""
    if metric is None or metric.dim() == 1:
        return None if metric is None else metric[columns]
    return metric[columns][:, columns]


def fit_rows(weight: Tensor, grid: ScaledGrid, metric: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scales and zero points of `weight` (N, K): two fp32 tensors (N, G).

    metric  (K,), what a squared error of each input costs, or (K, K), of which each group uses its own block; None: as
            the grid's rule says
    """
    if metric is None:
        return grid.fit_rows(weight)
    rows, columns = weight.shape
    width = grid.columns_per_group(columns)
    found = []
    for first in range(0, columns, width):
        members = slice(first, first + width)
        scale, zero = fit_group(weight[:, members], grid, part_of(metric, members))
        found.append((scale.expand(rows), zero.expand(rows)))
    scales, zeros = zip(*found, strict=True)
    return torch.stack(scales, 1), torch.stack(zeros, 1)


def fit_group(weight: Tensor, grid: ScaledGrid, metric: Tensor | None) -> tuple[Tensor, Tensor]:
    """Scale and zero point of one group of every row: `weight` (N, n) -> two fp32 tensors (N,).

    metric  (n,) or (n, n), only for integer grids and iq4_nl; None: as the grid's rule says

    With a metric and a grid of one scale per matrix, `weight` is the whole of it and the tensors are (1,).
    """
    if metric is None or not searchable(grid):
        return grid.fit(weight)
    pooled = grid.group_size == "tensor"
    chunks = (weight,) if pooled else weight.split(ROWS_AT_ONCE)
    found = [_Search(chunk.float().contiguous(), grid, metric.float(), pooled).run() for chunk in chunks]
    scales, zeros = zip(*found, strict=True)
    return torch.cat(scales), torch.cat(zeros)


def _cheapest(
    library: ctypes.CDLL, weight: Tensor, costs: Tensor, scales: Tensor, zeros: Tensor, grid: IntegerGrid
) -> Tensor:
    """Which of the candidates (C, N) loses least for each row of `weight` (N, n): int64 (1, N)."""
    assert len(scales) % 16 == 0, "the kernel looks at sixteen candidates at a time"
    best = torch.empty(1, len(weight), dtype=torch.int64)
    kind = 2 if grid.offset else int(grid.zero == "float" and not grid.symmetric)
    arrays = [each.contiguous() for each in (weight, costs, scales.T, zeros.T)]
    sizes = [ctypes.c_int64(size) for size in (*weight.shape, len(scales))]
    ends = [ctypes.c_float(end) for end in (grid.low, grid.high)]
    pointers = [ctypes.c_void_p(array.data_ptr()) for array in (*arrays, best)]
    threads = ctypes.c_int(torch.get_num_threads())
    library.cheapest_scales(*pointers[:-1], *sizes, ctypes.c_int(kind), *ends, pointers[-1], threads)
    return best


@dataclass
class _Search:
    """The best so far for rows (N, n); `pooled`: they share one scale."""

    weight: Tensor
    grid: ScaledGrid
    metric: Tensor
    pooled: bool

    def run(self) -> tuple[Tensor, Tensor]:
        flat = self.weight.reshape(1, -1) if self.pooled else self.weight
        self.scale, self.zero = self.grid.fit(flat)
        self.loss = self._loss(self.scale, self.zero)
        costs = self.metric if self.metric.dim() == 1 else self.metric.diagonal()
        counted = self.weight * (costs > 0)
        for scale, zero in self._nominated(*self._candidates(counted.reshape(flat.shape))):
            self._try(scale, zero)
        for _ in range(REFINEMENTS):
            self._try(*self._closed_form())
        return self.scale, self.zero

    def _nominated(self, scales: Tensor, zeros: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Which of the candidates (C, N) to try: of each row the cheapest, where a compiled kernel can tell."""
        if isinstance(self.grid, IntegerGrid) and self.metric.dim() == 1 and not self.pooled:
            library = helper("scale_search.cpp", "penjing.numerics")
            if library is not None:
                best = _cheapest(library, self.weight, self.metric, scales, zeros, self.grid)
                scales, zeros = scales.gather(0, best), zeros.gather(0, best)
        return zip(scales, zeros, strict=True)

    def _try(self, scale: Tensor, zero: Tensor) -> None:
        loss = self._loss(scale, zero)
        better = loss < self.loss
        self.scale = torch.where(better, scale, self.scale)
        self.zero = torch.where(better, zero, self.zero)
        self.loss = torch.where(better, loss, self.loss)

    def _loss(self, scale: Tensor, zero: Tensor) -> Tensor:
        scale, zero = scale.unsqueeze(1), zero.unsqueeze(1)
        change = self.grid.decode(self.grid.encode(self.weight, scale, zero), scale, zero).sub_(self.weight)
        return self._product(change, change)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """left M right^T of each row (N,), summed into (1,) when rows share a scale."""
        weighted = left * self.metric if self.metric.dim() == 1 else left @ self.metric
        total = weighted.mul_(right).sum(-1)
        return total.sum(0, keepdim=True) if self.pooled else total

    def _candidates(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points to try for rows of `flat` (N, n): two tensors (C, N)."""
        grid, steps = self.grid, 2**self.grid.bits - 1
        if isinstance(grid, FloatGrid) or grid.symmetric:
            high = grid.largest if isinstance(grid, FloatGrid) else grid.high
            narrowest = SMALLEST if isinstance(grid, FloatGrid) else SMALLEST * 2 * high / steps
            widest = flat.abs().amax(-1) / high
            scale = grid.storable(torch.linspace(narrowest, 1, SCALES).unsqueeze(1) * widest)
            return torch.cat([scale, -scale]), self.zero.expand(2 * SCALES, -1)
        smallest, largest = flat.amin(-1), flat.amax(-1)
        if not grid.offset:
            smallest, largest = smallest.clamp(max=0), largest.clamp(min=0)
        fractions = torch.linspace(0.3, 1, ENDS)
        bottom, top = (each.reshape(-1, 1) for each in torch.meshgrid(fractions, fractions, indexing="ij"))
        scale = grid.storable((largest * top - smallest * bottom) / steps)
        zero = smallest * bottom if grid.offset else grid.low - smallest * bottom / scale
        return scale, grid.storable_zero(zero)

    def _closed_form(self) -> tuple[Tensor, Tensor]:
        """Least squares for the codes of the best: of the zero point where there is one, then of the scale."""
        scale, zero = self.scale.unsqueeze(1), self.zero.unsqueeze(1)
        codes = self.grid.encode(self.weight, scale, zero)
        zero_point, target = self.zero, self.weight
        if isinstance(self.grid, FloatGrid):
            shifted = self.grid.decode(codes, torch.ones_like(self.weight))
        elif self.grid.offset:
            shifted = codes - self.grid.low
            slope, offset, spread = self._line(shifted)
            zero_point = self.grid.storable_zero(torch.where(spread > 0, offset / spread, zero_point))
            target = self.weight - zero_point.unsqueeze(1)
        else:
            if not self.grid.symmetric:
                slope, offset, _ = self._line(codes)
                zero_point = self.grid.storable_zero(torch.where(slope == 0, zero_point, -offset / slope))
            shifted = codes - zero_point.unsqueeze(1)
        norm = self._product(shifted, shifted)
        fitted = self._product(shifted, target) / norm
        return self.grid.storable(torch.where(norm > 0, fitted, self.scale)), zero_point

    def _line(self, codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slope and offset of the best line from codes (N, n) to weights, both times the third number."""
        ones = torch.ones_like(codes)
        squares, sums, count = (self._product(*pair) for pair in ((codes, codes), (ones, codes), (ones, ones)))
        ahead, level = self._product(codes, self.weight), self._product(ones, self.weight)
        return ahead * count - level * sums, level * squares - ahead * sums, squares * count - sums * sums
