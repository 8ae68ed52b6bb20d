"""SpQR: very small groups with quantised statistics, and the few weights that no grid can hold kept as they are.

The sweep of GPTQ (`penjing.numerics.sweep`; U the upper factor of the inverse Hessian, most active inputs first) on a
bilevel grid (`penjing.numerics.bilevel`), with two decisions on outliers. The damage of rounding weight j of a row is

    damage_j = (w_j - q_j)^2 / U[j, j]^2

1. Before a group of inputs is rounded, each row asks of each weight: by how much would the damage of the group fall if
   this one were left out, of the grid's range and of the sum? Weights that save more than tau do not count when the
   grid is fitted.
2. When a column is rounded, weights whose own damage is above tau stay as they are, in the storage dtype. They cause no
   error, so nothing is compensated for them.

tau is a multiple of the mean over columns of var(W_:j) / U[j, j]^2 (`threshold`, 0.2 in the paper), or found by trial
sweeps of some rows so that a share of the weights is above it (`outliers`). Either way the true share is up to the
data: the plan counts with `outliers`, the report has the true bytes.

Worked example of the first question, 2 bits, U = I, group [0, 1, 3, 10]: scale 10/3, the codes [0, 0, 1, 3] decode to
[0, 0, 3.33, 10], damages [0, 1, 0.11, 0]. Without 10 the range is [0, 3] and the rest is exact: leaving 10 out saves
1.11. Leaving out 1 does not change the range and saves its own damage, 1. In fact only the smallest and the largest
weight of a group can change the range, so that two refits answer for all.

Differences from the authors' code, on purpose: second-level numbers are rounded to their storage type before codes are
computed; an outlier's rounding to the storage type is compensated like any error; groups far from zero are widened
(theirs gives constant groups a range of [-1, 1]); where every weight of a group would be left out, only the one that
saves most is; inputs that were never active have no outliers.

Source: Dettmers, Svirschevski, Egiazarian et al. 2024, "SpQR" (arXiv:2306.03078), algorithm 1.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from penjing.methods.base import LinearInput, Options
from penjing.methods.quantization.gptq import Order, visiting_order
from penjing.numerics.bilevel import BilevelGrid, Statistics, savings
from penjing.numerics.cholesky import dead_columns, inverse_factor
from penjing.numerics.sweep import block_bounds, sweep
from penjing.representations import Bilevel, Outliers, Patched, Scheme
from penjing.statistics import Gram

TRIAL_ROWS = 512
"""Rows, at least, on which a limit is tried before the sweep proper (all rows of smaller matrices)."""

TRIALS = 6
"""How often a limit is corrected at most."""


class OutlierWarning(UserWarning):
    """The share of outliers is not what the plan counted with."""


class SpQROptions(Options):
    """Recipe keys of SpQR."""

    bits: int = Field(3, ge=2, le=8, description="bits per weight")
    group_size: int = Field(16, ge=2, description="consecutive inputs, in visiting order, that share scale and zero")
    statistic_bits: int = Field(3, ge=2, le=8, description="bits of a scale, and of a zero")
    statistic_group: int = Field(16, ge=2, description="consecutive rows whose scales are quantised together")
    outliers: float = Field(
        0.01, ge=0, lt=0.5, description="share of the weights kept as they are; with `threshold`, what the plan expects"
    )
    threshold: float | None = Field(
        None, gt=0, description="what makes an outlier, relative to the mean variance of a column; the paper has 0.2"
    )
    block_size: int = Field(128, ge=1, description="columns whose updates are batched; changes speed, not the result")
    damping: float = Field(1.0, ge=0, description="added to the Hessian's diagonal, relative to its mean")
    order: Order = Field(
        "activation",
        description="which inputs are rounded first: as they come, the most active first (needs a stored group index), "
        "or the most active group first and inside it the most active first",
    )

    @model_validator(mode="after")
    def _threshold_needs_outliers(self) -> Self:
        if self.threshold is not None and not self.outliers:
            raise ValueError("`threshold` makes outliers, so `outliers: 0` cannot hold; give the share to expect")
        return self

    def grid(self, scale_dtype: torch.dtype) -> BilevelGrid:
        """The grid these keys describe."""
        return BilevelGrid(self.bits, self.group_size, self.statistic_bits, self.statistic_group, scale_dtype)

    def scheme(self, before: Scheme, storage_dtype: torch.dtype) -> Scheme:
        """Adds grid and outliers; ValueError after a pruning step."""
        if before.sparsity:
            raise ValueError("spqr has no exact zero on its grid and would fill what an earlier step pruned; use gptq")
        return replace(
            before, grid=self.grid(storage_dtype), ordered=self.order == "activation", outliers=self.outliers
        )


def spqr(
    weight: Tensor,
    gram: Tensor,
    grid: BilevelGrid,
    *,
    outliers: float = 0.01,
    threshold: float | None = None,
    block_size: int = 128,
    damping: float = 1.0,
    order: Order = "activation",
) -> Patched | Bilevel:
    """Quantise `weight` (N, K) given `gram` (K, K), the sum of outer products of its inputs.

    About a share `outliers` of the weights, or those above `threshold` when it is given, stay in `grid.scale_dtype`;
    with `outliers` 0 there are none and the result is not patched. Inputs that were never active count as zero weights.
    With order `activation` the result has a `group_index`. Warns with `DampingWarning` when the Gram matrix needs more
    damping than asked for.
    """
    dead = dead_columns(gram)
    visited = visiting_order(gram.diagonal(), grid.columns_per_group(len(gram)), order)
    factor, _ = inverse_factor(gram[visited][:, visited], damping)
    current = weight.float().masked_fill(dead, 0)[:, visited].T.contiguous()
    harm = factor.diagonal().square().reciprocal_().masked_fill_(dead[visited], 0).unsqueeze(1)
    group_of = (torch.arange(len(gram)) if order == "activation" else visited) // grid.group_size
    sweeper = _Sweep(factor, harm, group_of, grid, block_size)
    limit = math.inf
    if threshold is not None:
        variance = current.var(1, correction=min(1, len(weight) - 1), keepdim=True)
        limit = threshold * float((variance * harm).mean())
    elif outliers:
        limit = sweeper.limit_for(current, outliers)
    codes, statistics, damage = sweeper.run(current, limit)

    back = visited.argsort()
    index = group_of[back].int() if order == "activation" else None
    coded = Bilevel(codes[back].T.contiguous(), statistics, grid, index)
    if limit == math.inf:
        return coded
    return Patched(coded, Outliers.of(current[back].T.to(grid.scale_dtype), (damage > limit)[back].T))


@dataclass(frozen=True)
class _Sweep:
    """Rounds matrices (K, N), columns in visiting order.

    harm      1 / U[j, j]^2 of each column (K, 1); 0 where nothing is known
    group_of  the group of each column (K,)
    """

    factor: Tensor
    harm: Tensor
    group_of: Tensor
    grid: BilevelGrid
    block_size: int

    @cached_property
    def spans(self) -> dict[int, int]:
        """First column of each group -> one past its last."""
        return dict(pairwise([0, *(self.group_of.diff().nonzero().squeeze(1) + 1).tolist(), len(self.group_of)]))

    def run(self, current: Tensor, limit: float) -> tuple[Tensor, Statistics, Tensor]:
        """Round `current` in place; weights whose damage is above `limit` are only rounded to the storage dtype.

        Returns codes (K, N), the statistics, and the damage (K, N) of each weight as the sweep found it.
        """
        codes, damage = torch.empty_like(current, dtype=torch.uint8), torch.empty_like(current)
        fitted: dict[int, Statistics] = {}
        groups = self.group_of.tolist()
        scale = zero = current[0]

        def fix_column(position: int, column: Tensor) -> Tensor:
            nonlocal scale, zero
            if stop := self.spans.get(position):
                fitted[groups[position]] = self._fit(current[position:stop], self.harm[position:stop], limit)
                scale, zero = fitted[groups[position]].values()
            code = self.grid.encode(column, scale, zero)
            value = self.grid.decode(code, scale, zero)
            codes[position] = code
            torch.mul((column - value).square_(), self.harm[position], out=damage[position])
            if limit == math.inf:
                return value
            return torch.where(damage[position] > limit, column.to(self.grid.scale_dtype).float(), value)

        sweep(current, self.factor, block_bounds(len(current), self.block_size, self.spans), fix_column)
        return codes, Statistics.stack([fitted[group] for group in sorted(fitted)]), damage

    def _fit(self, members: Tensor, harm: Tensor, limit: float) -> Statistics:
        low, high = members.aminmax(dim=0)
        if limit < math.inf:
            saved = savings(members, harm, self.grid)
            likely = saved > limit
            # One huge weight makes all others look like outliers: then it goes first.
            likely &= ~likely.all(0) | (saved == saved.amax(0))
            likely &= ~likely.all(0)
            low, high = members.masked_fill(likely, torch.inf).amin(0), members.masked_fill(likely, -torch.inf).amax(0)
        return self.grid.code_statistics(torch.stack(self.grid.fit(low, high)))

    def limit_for(self, current: Tensor, share: float) -> float:
        """The limit that makes a `share` of the weights of `current` outliers, to about 5 % of the share.

        Starts with what leaving weights out saves before the sweep; then sweeps a sample of the rows and follows the
        secant of log share over log limit.
        """
        size, rows = self.grid.statistic_group, current.shape[1]
        step = max(rows // TRIAL_ROWS, 1)
        sample = current[:, [row for row in range(rows) if row // size % step == 0]].contiguous()
        saved = torch.cat([savings(sample[a:b], self.harm[a:b], self.grid) for a, b in self.spans.items()]).flatten()
        limit = max(float(saved.kthvalue(max(len(saved) - round(share * len(saved)), 1)).values), 0.0)
        slope, before = -1.0, (0.0, 0.0)
        for _ in range(TRIALS if limit else 0):
            found = max(float((self.run(sample.clone(), limit)[2] > limit).double().mean()), 1 / sample.numel())
            if abs(found - share) < 0.05 * share:
                break
            here = (math.log(limit), math.log(found))
            if before != (0.0, 0.0) and here[0] != before[0]:
                slope = min(max((here[1] - before[1]) / (here[0] - before[0]), -4.0), -0.25)
            limit, before = limit * (share / found) ** (1 / slope), here
        return limit


def linear(given: LinearInput, options: SpQROptions) -> Patched | Bilevel:
    """Quantise one linear; warns with `OutlierWarning` when the plan's size is off by a fifth of the outliers."""
    result = spqr(
        given.weight,
        given.statistics[Gram].value,
        options.grid(given.storage_dtype),
        outliers=options.outliers,
        threshold=options.threshold,
        block_size=options.block_size,
        damping=options.damping,
        order=options.order,
    )
    if isinstance(result, Patched):
        share = result.patch.index.numel() / given.weight.numel()
        if abs(share - options.outliers) > 0.2 * options.outliers:
            warnings.warn(
                f"{share:.2%} of the weights are outliers, the plan counted with {options.outliers:.2%}",
                OutlierWarning,
                stacklevel=2,
            )
    return result
