"""Binary coding: a weight as a signed sum of a few scales that its group shares.

    w_hat = sum_i alpha_i b_i (+ offset)        b_i in {-1, +1},  i < bits

`bits` scales give 2**bits levels that need not be evenly spaced, at the price of `bits` stored numbers per group.
A code holds the signs: bit i is 1 where b_i = +1. Signs of the scales and their order do not change the set of
levels, so scales are kept positive and falling.

Two steps fit a group of n weights, each the best given the other:

    scales   argmin_a (w - B a) M (w - B a)^T      least squares, (B^T M B) a = B^T M w
    codes    the nearest of the 2**bits levels, weight by weight

in a metric M: a weight per input (importance), or a matrix. Plain mean squared error of the weights is the metric
of the literature and a poor one: two inputs of a language model differ in strength by orders of magnitude.

Worked example: w = [1, 2, -2, 7]. Greedy, one bit: alpha = mean |w| = 3 leaves [-2, -1, 1, 4]. A second bit takes the
scale 2: the levels are -5, -1, 1, 5, w_hat = [1, 1, -1, 5], squared error 6. One round: least squares for these codes
gives alpha = [13/3, 8/3], the levels -7, -5/3, 5/3, 7, and the squared error falls to 2/3.

Sources: greedy Rastegari et al. 2016 (arXiv:1603.05279); alternating Xu et al. 2018 (arXiv:1802.00150); the exact
coding of uniform grids Park et al. 2024, LUT-GEMM (arXiv:2206.09557), section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penjing.numerics.grids import Grouped, group_label

RIDGE = 1e-6
"""Added to the diagonal of the normal equations, relative to it: two equal planes share their scale."""


@dataclass(frozen=True)
class BinaryGrid(Grouped):
    """Levels `sum_i +-alpha_i (+ offset)`, fitted per group along the last axis.

    bits          scales per group, 1 to 8
    group_size    consecutive inputs that share scales; None: a row. The last group of a row may be shorter
    scale_dtype   in which scales are stored
    offset_dtype  in which offsets are stored; None: without offsets, levels lie symmetrically about zero
    inputs_dtype  in which a factor per input, for all rows alike, is stored; None: without
    """

    bits: int = 3
    group_size: int | None = 128
    scale_dtype: torch.dtype = torch.bfloat16
    offset_dtype: torch.dtype | None = None
    inputs_dtype: torch.dtype | None = None

    @property
    def label(self) -> str:
        """Group, kind and what comes with it: "g64 binary-coded offset"."""
        extras = (" offset" if self.offset_dtype else "") + (" with input values" if self.inputs_dtype else "")
        return f"{group_label(self.group_size)} binary-coded{extras}"


@dataclass(frozen=True)
class Levels:
    """The scales of R groups, fp32.

    alpha   (R, bits), positive and falling
    offset  (R,); zeros on a grid without offsets
    """

    alpha: Tensor
    offset: Tensor

    def stored(self, grid: BinaryGrid) -> Levels:
        """The same rounded to the types that `grid` stores."""
        offset = torch.zeros_like(self.offset) if grid.offset_dtype is None else self.offset.to(grid.offset_dtype)
        return Levels(self.alpha.to(grid.scale_dtype).float(), offset.float())

    def where(self, better: Tensor, other: Levels) -> Levels:
        """These where `better` (bool (R,)) holds, `other` elsewhere."""
        alpha = torch.where(better[:, None], self.alpha, other.alpha)
        return Levels(alpha, torch.where(better, self.offset, other.offset))


def signs(codes: Tensor, bits: int) -> Tensor:
    """Bit planes of integer codes (...) as fp32 (..., bits) of -1 and +1, the lowest bit first."""
    planes = (codes.unsqueeze(-1) >> torch.arange(bits, dtype=codes.dtype, device=codes.device)) & 1
    return planes.float().mul_(2).sub_(1)


def decode(codes: Tensor, levels: Levels) -> Tensor:
    """Values (R, n) of codes (R, n): scales are added in order, then the offset."""
    values = torch.zeros(codes.shape, device=codes.device)
    for plane in range(levels.alpha.shape[1]):
        scale = levels.alpha[:, plane, None]
        values += torch.where((codes >> plane) & 1 == 1, scale, -scale)
    return values + levels.offset[:, None]


class Nearest:
    """Finds the nearest of the 2**bits levels of each of R groups: sorts them once, then searches."""

    def __init__(self, levels: Levels) -> None:
        bits = levels.alpha.shape[1]
        every = torch.arange(2**bits, dtype=torch.uint8, device=levels.alpha.device)
        values, self._order = decode(every.expand(len(levels.alpha), -1), levels).sort(-1)
        self._values = values
        self._between = ((values[:, 1:] + values[:, :-1]) / 2).contiguous()
        self._order = self._order.to(torch.uint8)

    def __call__(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """`weight` (R, n) -> codes uint8 (R, n) and the values they stand for, fp32 (R, n)."""
        place = torch.searchsorted(self._between, weight.contiguous())
        return self._order.gather(1, place), self._values.gather(1, place)


def greedy(weight: Tensor, bits: int, importance: Tensor | None = None, *, offset: bool = False) -> Levels:
    """Scales of groups `weight` (R, n), one after the other: each the mean magnitude of what is left.

    importance  (R, n) or (n,), not negative: the mean is weighted by it. A group without any counts its weights alike
    offset      start with the mean of the group
    """
    rest = weight.float()
    share = _shares(rest, importance)
    centre = (rest * share).sum(-1) if offset else rest.new_zeros(len(rest))
    rest = rest - centre[:, None]
    alpha = []
    for _ in range(bits):
        scale = (rest.abs() * share).sum(-1)
        rest = rest - torch.where(rest < 0, -scale[:, None], scale[:, None])
        alpha.append(scale)
    return _canonical(torch.stack(alpha, -1), centre)


def uniform(weight: Tensor, bits: int, *, offset: bool = False) -> Levels:
    """Evenly spaced levels from the smallest to the largest weight, or without offset from -max|w| to max|w|."""
    weight = weight.float()
    low, high = weight.amin(-1), weight.amax(-1)
    centre = (low + high) / 2 if offset else torch.zeros_like(low)
    span = high - low if offset else 2 * weight.abs().amax(-1)
    powers = 2.0 ** torch.arange(bits - 2, -2, -1, device=weight.device)
    return Levels(span[:, None] / (2**bits - 1) * powers, centre)


def alternating(
    weight: Tensor, start: Levels, rounds: int, importance: Tensor | None = None, *, offset: bool = False
) -> Levels:
    """Improve `start` for groups `weight` (R, n): nearest codes, then the best scales for them, `rounds` times.

    The weighted error never rises (up to rounding). `importance` as in `greedy`.
    """
    weight = weight.float()
    share = _shares(weight, importance)
    levels = start
    for _ in range(rounds):
        codes, _ = Nearest(levels)(weight)
        levels = least_squares(weight, codes, share, bits=start.alpha.shape[1], offset=offset)
    return levels


def weighted_error(weight: Tensor, levels: Levels, importance: Tensor | None = None) -> Tensor:
    """Mean squared error (R,) of groups `weight` (R, n) at the nearest of `levels`. `importance` as in `greedy`."""
    _, values = Nearest(levels)(weight)
    return ((weight - values).square() * _shares(weight, importance)).sum(-1)


def least_squares(
    weight: Tensor, codes: Tensor, metric: Tensor, *, bits: int, offset: bool = False, kept: Tensor | None = None
) -> Levels:
    """The scales, and offset, that are best for given codes.

    weight  (R, n)
    codes   (R, n)
    metric  an importance per weight (R, n), or symmetric matrices (1 or R, n, n)
    kept    bool (R, n): weights outside decode to zero whatever the scales
    """
    planes = signs(codes, bits)
    if offset:
        planes = torch.cat([planes, planes.new_ones(*codes.shape, 1)], -1)
    if kept is not None:
        planes = planes * kept.unsqueeze(-1)
    seen = metric @ planes if metric.dim() == 3 else planes * metric.unsqueeze(-1)
    normal, right = seen.mT @ planes, seen.mT @ weight.unsqueeze(-1)
    size = normal.diagonal(dim1=1, dim2=2).mean(-1).clamp(min=torch.finfo(normal.dtype).tiny)
    normal = normal / size[:, None, None]
    normal.diagonal(dim1=1, dim2=2).add_(RIDGE)
    solution = torch.linalg.solve(normal, right / size[:, None, None]).squeeze(-1)
    return _canonical(solution[:, :bits], solution[:, bits] if offset else torch.zeros_like(solution[:, 0]))


def _canonical(alpha: Tensor, offset: Tensor) -> Levels:
    return Levels(alpha.abs().sort(-1, descending=True).values, offset)


def _shares(weight: Tensor, importance: Tensor | None) -> Tensor:
    """`importance` scaled to sum to 1 over each group, (R, n)."""
    if importance is None:
        return torch.full_like(weight, 1 / weight.shape[-1])
    importance = importance.float().expand_as(weight)
    total = importance.sum(-1, keepdim=True)
    return torch.where(total > 0, importance / total, 1 / weight.shape[-1])
