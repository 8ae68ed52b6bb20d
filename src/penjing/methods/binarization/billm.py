"""BiLLM: two signs for the columns that matter, a bell-shaped split into two scales for all others, GPTQ around it.

Columns are taken in blocks. With U the factor of GPTQ, an error d of column j costs (d / U[j, j])^2 however later
columns answer. In a block of columns W:

    salient       the s columns with the largest sum_i (W_ij / U[j, j])^2: order-2 residual binarisation,
                  w ~ a_1 b_1 + a_2 b_2
    all others    |w| <= p: scale a_small; |w| > p: scale a_large; sign(w) either way, as weights are bell-shaped

with scales per row and s and p chosen to cost least. Then the error of the block goes into the columns after it,
e = (W - W_hat) U_b^-1, as in `bcq`.

Two scales and a sign are four levels, +-(a_large + a_small) / 2 +- (a_large - a_small) / 2: both kinds of columns are
binary-coded with two planes, which is how they are stored. The paper counts 1.08 bits because it leaves the split out
of the count; which scale a weight has is a bit like any other, so that honest storage is 2 bits and four scales per row
and block (0.5 bits in blocks of 128). `bcq` with 2 bits searches the same levels without the salient columns.

Worked example of the split: w = [0.1, -0.2, 0.3, 2], p = 1: a_small = 0.2, a_large = 2; w_hat = [0.2, -0.2, 0.2, 2],
planes 1.1 and 0.9, error 0.02. One scale, 0.65, has the error 2.45.

Differences from the authors' code: errors are weighed by what they cost while s and p are searched; p is tried at
fractions of the largest weight of the block; scales are rounded to storage before errors are passed on.

Source: Huang et al. 2024, "BiLLM: Pushing the Limit of Post-Training Quantization for LLMs" (arXiv:2402.04291).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from pydantic import Field
from torch import Tensor

from penjing.methods.base import LinearInput, Options
from penjing.numerics.binary_coding import BinaryGrid, Levels, Nearest, decode, greedy
from penjing.numerics.cholesky import dead_columns, inverse_factor
from penjing.representations import BinaryCoded, Masked, Scheme
from penjing.statistics import Gram

SALIENT = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48)
"""Numbers of salient columns tried per block, of which at most half of its columns may be."""

SPLITS = tuple(step / 40 for step in range(4, 37))
"""Split points tried, as fractions of the largest weight."""


class BiLLMOptions(Options):
    """Recipe keys of BiLLM."""

    block_size: int = Field(128, ge=4, multiple_of=2, description="columns coded together, each kind with its scales")
    damping: float = Field(0.01, ge=0, description="added to the Hessian's diagonal, relative to its mean")

    def grid(self, storage_dtype: torch.dtype) -> BinaryGrid:
        """Two planes, and two groups of scales per block."""
        return BinaryGrid(2, self.block_size // 2, storage_dtype)

    def scheme(self, before: Scheme, storage_dtype: torch.dtype) -> Scheme:
        return replace(before, grid=self.grid(storage_dtype), ordered=True)


@dataclass(frozen=True)
class _Part:
    """Columns of one kind, coded: levels as stored, codes and values (N, n), what their errors cost."""

    levels: Levels
    codes: Tensor
    values: Tensor
    cost: float


def billm(
    weight: Tensor, gram: Tensor, grid: BinaryGrid, *, damping: float = 0.01, kept: Tensor | None = None
) -> BinaryCoded | Masked:
    """Binarise `weight` (N, K) given `gram` (K, K), the sum of outer products of its inputs.

    Blocks have twice the columns of the grid's groups. Inputs that were never active do not count. Weights outside
    `kept` (bool (N, K)) become exactly zero and their error is compensated like any other. Warns with `DampingWarning`
    when the Gram matrix needs more damping than asked for.
    """
    rows, columns = weight.shape
    groups, width = grid.groups(columns), 2 * grid.columns_per_group(columns)
    factor, _ = inverse_factor(gram, damping)
    current = weight.float().masked_fill(dead_columns(gram), 0)
    alpha = torch.ones(rows, groups, 2, dtype=grid.scale_dtype)
    codes, index = torch.empty(rows, columns, dtype=torch.uint8), torch.empty(columns, dtype=torch.int32)
    for block, start in enumerate(range(0, columns, width)):
        stop = min(start + width, columns)
        inside = factor[start:stop, start:stop]
        mask = None if kept is None else kept[:, start:stop]
        costs, may_split = inside.diagonal() ** -2.0, 2 * block + 1 < groups
        salient, parts = _code_block(current[:, start:stop], costs, grid, mask, may_split)
        values = torch.empty(rows, stop - start)
        for kind, (members, part) in enumerate(zip((~salient, salient), parts, strict=False)):
            places = members.nonzero()[:, 0]
            index[start + places], alpha[:, 2 * block + kind] = 2 * block + kind, part.levels.alpha.to(alpha.dtype)
            codes[:, start + places], values[:, places] = part.codes, part.values
        fixed = values if mask is None else values * mask
        errors = torch.linalg.solve_triangular(inside, current[:, start:stop] - fixed, upper=True, left=False)
        current[:, stop:] -= errors @ factor[start:stop, stop:]
    coded = BinaryCoded(codes, alpha, None, grid, group_index=index)
    return coded if kept is None else Masked(coded, kept)


def _code_block(
    weight: Tensor, costs: Tensor, grid: BinaryGrid, kept: Tensor | None, may_split: bool
) -> tuple[Tensor, list[_Part]]:
    """Which columns of a block (N, n) are salient, bool (n,), and the codes of the others and of these."""
    share = costs.expand_as(weight) if kept is None else costs * kept
    order = (weight.square() * share).sum(0).argsort(descending=True, stable=True)
    numbers = [count for count in SALIENT if count <= weight.shape[1] // 2] if may_split else [0]
    best: tuple[float, Tensor, list[_Part]] | None = None
    for count in numbers:
        salient = torch.zeros(weight.shape[1], dtype=torch.bool)
        salient[order[:count]] = True
        parts = [_split(weight[:, ~salient], share[:, ~salient], grid)]
        if count:
            parts.append(_residual(weight[:, salient], share[:, salient], grid))
        cost = sum(part.cost for part in parts)
        if best is None or cost < best[0]:
            best = cost, salient, parts
    assert best is not None
    return best[1], best[2]


def _residual(weight: Tensor, share: Tensor, grid: BinaryGrid) -> _Part:
    """Order-2 residual binarisation of columns (N, n)."""
    return _coded(weight, share, greedy(weight, 2, share), grid)


def _split(weight: Tensor, share: Tensor, grid: BinaryGrid) -> _Part:
    """One scale for the weights of each row below the best split point of the columns (N, n), one for those above."""
    magnitude = weight.abs()
    largest = float(magnitude.max())
    best: tuple[float, Tensor, Tensor] | None = None
    for fraction in SPLITS:
        above = magnitude > fraction * largest
        large, left = _mean(magnitude, share * above)
        small, beside = _mean(magnitude, share * ~above)
        cost = float((left + beside).sum())
        if best is None or cost < best[0]:
            best = cost, torch.where(large > 0, large, small), small
    assert best is not None
    _, large, small = best
    high, low = torch.maximum(large, small), torch.minimum(large, small)
    levels = Levels(torch.stack([(high + low) / 2, (high - low) / 2], -1), torch.zeros_like(high))
    return _coded(weight, share, levels, grid)


def _mean(magnitude: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Weighted mean of each row and the weighted squares about it; 0 where nothing counts."""
    total = share.sum(1).clamp(min=torch.finfo(torch.float32).tiny)
    mean = (magnitude * share).sum(1) / total
    return mean, ((magnitude - mean.unsqueeze(1)).square() * share).sum(1)


def _coded(weight: Tensor, share: Tensor, levels: Levels, grid: BinaryGrid) -> _Part:
    levels = levels.stored(grid)
    codes, _ = Nearest(levels)(weight)
    values = decode(codes, levels)
    return _Part(levels, codes, values, float(((weight - values).square() * share).sum()))


def linear(given: LinearInput, options: BiLLMOptions) -> BinaryCoded | Masked:
    """Binarise one linear: which columns are salient is decided by all its outputs."""
    grid = options.grid(given.storage_dtype)
    return billm(given.weight, given.statistics[Gram].value, grid, damping=options.damping, kept=given.kept)
