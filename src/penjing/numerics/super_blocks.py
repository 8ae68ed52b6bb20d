"""Scales and minima as whole numbers times one 16-bit number per super-block: the two levels of GGUF's K-quants.

A super-block is 256 consecutive inputs of a row, in P groups of g. With q the codes counted from 0 (on a symmetric grid
as they are), a the codes of the scales and b those of the minima,

    w_hat = d a q + e b          d and e 16-bit floats of the super-block, e <= 0

Given scales s and minima z of the groups, coding begins with d = max s / 63 and a = round(s / d), for 6 bits (on a
symmetric grid a has a sign, and the largest becomes the smallest code), e and b in the same way. That alone moves
every scale by up to half of d. With a metric M (see `scale_search`) the loss sum (w - w_hat) M (w - w_hat)^T is then
lowered in turns, each step taken only where it lowers it:

    d, e    the codes q, a, b held: least squares, a line through the whole super-block, rounded to 16 bits
    a, b    d and e held: each group tries one less and one more of either

after each of which the weights are encoded anew.

Worked example, one group, 2 bits, codes of scales up to 15, no minimum needed: w = (0, 1, 2, 2.9), s = 2.9 / 3 = 0.967
codes as a = 15, d = 0.0645 (0.06445 in fp16) and decodes to (0, 0.967, 1.934, 2.9), loss 0.0054. Least squares over
q = (0, 1, 2, 3) is d a = (1 + 4 + 8.7) / 14 = 0.979: (0, 0.979, 1.957, 2.936), loss 0.0036.

The format is llama.cpp's; the way to these numbers is ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penjing.numerics.grids import IntegerGrid
from penjing.numerics.scale_codes import ScaleCodes

ROUNDS = 4
"""How often both steps are repeated."""

ROWS_AT_ONCE = 512
"""Keeps what a candidate needs in the cache; rows do not affect each other."""


def code_scales(
    weight: Tensor, scale: Tensor, zero: Tensor, grid: IntegerGrid, metric: Tensor | None = None
) -> tuple[ScaleCodes, ScaleCodes | None]:
    """Coded scales, and on a grid with minima coded minima, for `weight` (N, K), K a multiple of 256.

    scale, zero  fp32 (N, G), what the groups would have if they could be anything
    metric       (K,) or (K, K), of which each group uses its own block; None: the first coding stays
    """
    chunks = zip(*(tensor.split(ROWS_AT_ONCE) for tensor in (weight.float(), scale, zero)), strict=True)
    blocks = _blocks(metric, grid)
    done = [_Coding.begin(part, fitted, minimum, grid, blocks).run() for part, fitted, minimum in chunks]
    scales = _joined([(coding.a, coding.d) for coding in done])
    return scales, _joined([(coding.b, coding.e) for coding in done]) if grid.offset else None


def _joined(parts: list[tuple[Tensor, Tensor]]) -> ScaleCodes:
    codes, shared = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    return ScaleCodes("whole", codes.flatten(1).to(torch.int8), shared.to(torch.float16))


def _blocks(metric: Tensor | None, grid: IntegerGrid) -> Tensor | None:
    """The metric of every group: (G, g), or (G, g, g)."""
    if metric is None:
        return None
    width = grid.columns_per_group(len(metric))
    if metric.dim() == 1:
        return metric.float().reshape(-1, width)
    return torch.stack([metric[a : a + width, a : a + width] for a in range(0, len(metric), width)]).float()


@dataclass
class _Coding:
    """The best so far for n rows of S super-blocks of P groups of g weights.

    weight  (n, S * P, g)
    a, b    codes of scales and minima, fp32 (n, S, P)
    d, e    fp32 (n, S), rounded to fp16
    """

    weight: Tensor
    grid: IntegerGrid
    metric: Tensor | None
    a: Tensor
    b: Tensor
    d: Tensor
    e: Tensor

    @classmethod
    def begin(cls, weight: Tensor, scale: Tensor, zero: Tensor, grid: IntegerGrid, metric: Tensor | None) -> _Coding:
        """Every scale and minimum rounded by itself."""
        low, high = grid.scale_range
        groups = grid.groups_per_block
        scale, zero = scale.unflatten(1, (-1, groups)), zero.unflatten(1, (-1, groups))
        if grid.symmetric:
            d = _half(scale.gather(-1, scale.abs().argmax(-1, keepdim=True)).squeeze(-1) / low)
        else:
            d = _half(scale.amax(-1) / high)
        e = _half(zero.amin(-1).clamp(max=0) / high)
        a, b = _divided(scale, d).clamp(low, high), _divided(zero, e).clamp(0, high)
        return cls(weight.unflatten(1, (scale.shape[1] * groups, -1)), grid, metric, a, b, d, e)

    def run(self) -> _Coding:
        """Both steps in turns."""
        if self.metric is not None:
            self.loss = self._loss(self.a, self.b, self.d, self.e)
            for _ in range(ROUNDS):
                self._whole()
                self._each()
        return self

    def _decoded(self, a: Tensor, b: Tensor, d: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and minima (n, G, 1)."""
        return (a * d.unsqueeze(-1)).flatten(1).unsqueeze(-1), (b * e.unsqueeze(-1)).flatten(1).unsqueeze(-1)

    def _loss(self, a: Tensor, b: Tensor, d: Tensor, e: Tensor) -> Tensor:
        """Of every group, (n, S, P)."""
        scale, zero = self._decoded(a, b, d, e)
        change = self.grid.decode(self.grid.encode(self.weight, scale, zero), scale, zero).sub_(self.weight)
        return self._product(change, change).reshape(a.shape)

    def _product(self, left: Tensor, right: Tensor) -> Tensor:
        """left M right^T of every group: (n, G)."""
        assert self.metric is not None
        if self.metric.dim() == 2:
            return (left * self.metric).mul_(right).sum(-1)
        return torch.einsum("ngi,gij,ngj->ng", left, self.metric, right)

    def _whole(self) -> None:
        """d and e by least squares, where that loses less."""
        scale, zero = self._decoded(self.a, self.b, self.d, self.e)
        codes = self.grid.encode(self.weight, scale, zero)
        steps = self.a.flatten(1).unsqueeze(-1) * (codes - self.grid.low if self.grid.offset else codes)
        squares, ahead = self._sums(steps, steps), self._sums(steps, self.weight)
        if self.grid.offset:
            level = self.b.flatten(1).unsqueeze(-1).expand_as(steps)
            both, levels, below = self._sums(steps, level), self._sums(level, level), self._sums(level, self.weight)
            spread = squares * levels - both * both
            safe = spread > 1e-6 * squares * levels
            d = torch.where(safe, (ahead * levels - below * both) / spread, self.d)
            e = torch.where(safe, (below * squares - ahead * both) / spread, self.e).clamp(max=0)
        else:
            d, e = torch.where(squares > 0, ahead / squares, self.d), self.e
        d, e = _half(d), _half(e)
        loss = self._loss(self.a, self.b, d, e)
        better = loss.sum(-1) < self.loss.sum(-1)
        self.d, self.e = torch.where(better, d, self.d), torch.where(better, e, self.e)
        self.loss = torch.where(better.unsqueeze(-1), loss, self.loss)

    def _sums(self, left: Tensor, right: Tensor) -> Tensor:
        """left M right^T of every super-block: (n, S)."""
        return self._product(left, right).reshape(self.a.shape).sum(-1)

    def _each(self) -> None:
        """Codes of single groups, one up or down, where that loses less."""
        low, high = self.grid.scale_range
        moves = [(-1, 0), (1, 0), (0, -1), (0, 1), (1, 1), (-1, -1)] if self.grid.offset else [(-1, 0), (1, 0)]
        for step, level in moves:
            a, b = (self.a + step).clamp(low, high), (self.b + level).clamp(0, high)
            loss = self._loss(a, b, self.d, self.e)
            better = loss < self.loss
            self.a, self.b = torch.where(better, a, self.a), torch.where(better, b, self.b)
            self.loss = torch.where(better, loss, self.loss)


def _half(values: Tensor) -> Tensor:
    return values.to(torch.float16).float()


def _divided(values: Tensor, unit: Tensor) -> Tensor:
    """Whole multiples of `unit`; 0 where that is 0."""
    unit = unit.unsqueeze(-1)
    return torch.where(unit == 0, 0, values / torch.where(unit == 0, 1, unit)).round()
