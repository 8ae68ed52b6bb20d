"""HQQ: keep the scale, move the zero point until most weights are close, and let a few be far. No calibration needed.

Zero points are any numbers, w_hat = s (q - z). For each group the l_p norm of the error, with p < 1 so that outliers
count little, is lowered by half-quadratic splitting: an auxiliary error e takes the norm, a quadratic penalty ties it
to the true one, and the two are solved for in turns, beta = beta * kappa each time:

    minimise over z, e     sum_j h_j (|e_j|^p + beta / 2 (w_j - s (q_j - z) - e_j)^2)

    q = clamp(round(w / s + z), low, high)
    e = shrink(w - s (q - z))      shrink(x) = sign(x) max(|x| - |x|^(p-1) / beta, 0)
    z = mean over j, weighted by h, of   q_j - (w_j - e_j) / s

h is 1, or with `weighted` the mean square of each input: then what is lowered is closer to the error of the layer's
output. Of all zero points on the way, each rounded to its storage type, a group keeps the one with the smallest
sum_j h_j (w_j - w_hat_j)^2; the first is that of round-to-nearest, so nothing gets worse by that measure.

Worked example: w = [0, 1, 2, 4], 2 bits (codes -2 to 1), no shrinking (e = 0). Round-to-nearest has s = 4/3, z = -2:
q = [-2, -1, 0, 1] (2 / s = 1.5 is a tie), w_hat = [0, 1.33, 2.67, 4]. The mean of q - w / s is -0.5 - 1.3125 = -1.8125,
the new z: q = [-2, -1, 0, 1] again, w_hat = [-0.25, 1.08, 2.42, 3.75]; the sum of squares falls from 0.56 to 0.31.

Weights of language models are small (0.01 to 0.1), and there |x|^(p-1) / beta exceeds |x|: e is 0, and each step is the
least-squares zero point for the codes. A larger beta lets e take part.

Differences from the authors' code, on purpose: the range of the first grid holds zero, so that zero points stay small
and lose little in storage; the best step is kept for each group, rather than one number of steps for the whole matrix;
beta grows, as in their text.

Source: Badri, Shaji 2023, "Half-Quadratic Quantization of Large Machine Learning Models" (mobiusml.github.io/hqq_blog);
the splitting is that of Geman, Reynolds 1992.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from pydantic import Field, field_validator
from torch import Tensor

from penjing.methods.base import GroupSize, LinearInput, Options
from penjing.methods.results import quantized, with_mask
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Masked, Quantized, Scheme
from penjing.statistics import ColumnNorm


class HQQOptions(Options):
    """Recipe keys of HQQ."""

    bits: int = Field(4, ge=2, le=8, description="bits per weight")
    group_size: GroupSize = 64
    weighted: bool = Field(False, description="weigh errors by the mean square of the inputs; needs calibration text")
    norm: float = Field(0.7, gt=0, le=1, description="p of the norm that is lowered; below 1, outliers count little")
    beta: float = Field(10, gt=0, description="weight of the quadratic penalty at first; larger: less shrinking")
    kappa: float = Field(1.01, ge=1, description="factor on `beta` after each step")
    iterations: int = Field(20, ge=0, description="steps; 0 rounds to nearest with zero points as they come")

    @field_validator("group_size")
    @classmethod
    def _not_the_matrix(cls, size: GroupSize) -> GroupSize:
        if size == "tensor":
            raise ValueError("HQQ fits a zero point per group or row; give a number or `channel`")
        return size

    def grid(self, scale_dtype: torch.dtype) -> IntegerGrid:
        """Asymmetric, with zero points of any value."""
        size = None if self.group_size == "channel" else self.group_size
        return IntegerGrid(self.bits, size, False, scale_dtype=scale_dtype, zero="float")

    def scheme(self, before: Scheme, storage_dtype: torch.dtype) -> Scheme:
        return replace(before, grid=self.grid(storage_dtype))


def hqq(
    weight: Tensor,
    options: HQQOptions,
    *,
    importance: Tensor | None = None,
    kept: Tensor | None = None,
    storage_dtype: torch.dtype = torch.bfloat16,
) -> Quantized | Masked:
    """Quantise `weight` (N, K).

    importance  (K,), what an error of each input costs; 1 for all without it
    kept        bool (N, K); the others do not count and become exactly zero (by the mask: few zero points hit zero)
    """
    weight, grid = weight.float(), options.grid(storage_dtype)
    columns = weight.shape[1]
    cost = torch.ones(columns) if importance is None else importance.float()
    if kept is not None:
        weight, cost = weight * kept, cost * kept
    cost = cost.expand_as(weight)
    scale, zero = grid.fit_rows(weight)
    width = grid.columns_per_group(columns)
    for group in range(scale.shape[1]):
        members = slice(group * width, (group + 1) * width)
        zero[:, group] = move_zero(weight[:, members], scale[:, group], zero[:, group], cost[:, members], grid, options)
    codes = grid.encode(weight, grid.spread(scale, columns), grid.spread(zero, columns))
    return with_mask(quantized(codes, scale, zero, grid), kept)


def move_zero(
    weight: Tensor, scale: Tensor, zero: Tensor, cost: Tensor, grid: IntegerGrid, options: HQQOptions
) -> Tensor:
    """The best zero point (N,) of a group `weight` (N, n) with `scale` (N,), from `zero` (N,); `cost` is (N, n)."""
    scale, best = scale.unsqueeze(1), zero.unsqueeze(1)
    smallest = _loss(weight, scale, best, cost, grid)
    for step in zero_points(weight, scale, best, cost, grid, options):
        stored = grid.storable_zero(step)
        loss = _loss(weight, scale, stored, cost, grid)
        best, smallest = torch.where(loss < smallest, stored, best), torch.minimum(loss, smallest)
    return best.squeeze(1)


def zero_points(
    weight: Tensor, scale: Tensor, zero: Tensor, cost: Tensor, grid: IntegerGrid, options: HQQOptions
) -> Iterator[Tensor]:
    """Zero points (N, 1) after each step, in fp32, from `zero` (N, 1); weights count by `cost` (N, n), if any does."""
    total = cost.sum(1, keepdim=True)
    share = torch.where(total > 0, cost, 1) / torch.where(total > 0, total, cost.shape[1])
    beta = options.beta
    for _ in range(options.iterations):
        codes = grid.encode(weight, scale, zero)
        error = shrink(weight - grid.decode(codes, scale, zero), beta, options.norm)
        zero = (share * (codes - (weight - error) / scale)).sum(1, keepdim=True)
        beta *= options.kappa
        yield zero


def shrink(error: Tensor, beta: float, norm: float) -> Tensor:
    """The e with the smallest |e|^p + beta / 2 (error - e)^2, to first order; small errors become 0."""
    size = error.abs()
    return error.sign() * (size - size.pow(norm - 1) / beta).clamp_(min=0)


def _loss(weight: Tensor, scale: Tensor, zero: Tensor, cost: Tensor, grid: IntegerGrid) -> Tensor:
    change = weight - grid.decode(grid.encode(weight, scale, zero), scale, zero)
    return (cost * change.square()).sum(1, keepdim=True)


def linear(given: LinearInput, options: HQQOptions) -> Quantized | Masked:
    """Quantise one linear, or the stacked rows of several."""
    importance = given.statistics[ColumnNorm].value if options.weighted else None
    return hqq(given.weight, options, importance=importance, kept=given.kept, storage_dtype=given.storage_dtype)
