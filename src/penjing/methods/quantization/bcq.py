"""Binary-coding quantisation: each weight is a signed sum of a few scales of its group, so that look-ups multiply.

    w_hat = sum_i alpha_i b_i (+ offset)        b_i in {-1, +1}

(see `penjing.numerics.binary_coding` for the fits, with an example). LUT-GEMM minimises |w - w_hat|^2 and codes
uniform grids exactly, because then alpha_i = s 2^i / 2. `objective` says what a fit minimises instead:

    weights   |w - w_hat|^2, as published; no calibration
    inputs    sum_k |x_k|^2 (w_k - w_hat_k)^2
    output    |(w - w_hat) X|^2, group by group, where the groups not yet coded make up for the error (GPTQ)

Objective `output`: with H = X X^T and U upper, H^-1 = U^T U, let U_g be the block of U of the group at hand. Whatever
the group is fixed at, the best that the inputs after it can do leaves

    |e|^2   with   e = (w - w_hat) U_g^-1           after which w_later -= e U[g, later]

so that (U_g^T U_g)^-1 is the group's own metric. Scales are fitted to it by turns: codes column by column with the
error fed forward inside the group, then the least-squares scales of these codes in that metric. Each row keeps the
best of the turns. On held-out tokens of two linears of SmolLM2-135M, groups of 128, this leaves about half of the
output error of asymmetric GPTQ at 2 bits, 70 % at 3 bits, and as much at 4 bits; more turns bring little.

Worked example, one bit, one group. w = [1, 0.6], H = [[2, 1], [1, 1]], U = [[1, -1], [0, 1]] (see `gptq`):

    greedy             alpha = 0.8     w_hat_1 = 0.8, e_1 = 0.2, w_2 = 0.6 + 0.2, w_hat_2 = 0.8     loss 0.04
    a turn, b = [1, 1] alpha = (b H w^T) / (b H b^T) = 4.2 / 5 = 0.84                               loss 0.032

Source: Park et al. 2024, "LUT-GEMM" (arXiv:2206.09557); the propagation is Penjing's.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from penjing.methods.base import LinearInput, Options
from penjing.methods.binary_results import Coding, coded_grid, from_integer
from penjing.methods.quantization.gptq import gptq, visiting_order
from penjing.methods.quantization.rtn import rtn
from penjing.numerics.binary_coding import BinaryGrid, Nearest
from penjing.numerics.binary_sweep import fit, refit
from penjing.numerics.cholesky import dead_columns, inverse_factor
from penjing.numerics.grids import IntegerGrid
from penjing.representations import BinaryCoded, Masked, Quantized, Scheme
from penjing.statistics import ColumnNorm, Gram, StatisticType

Objective = Literal["weights", "inputs", "output"]


class BCQOptions(Options):
    """Recipe keys of binary-coding quantisation."""

    bits: int = Field(3, ge=1, le=8, description="scales per group; 2**bits levels")
    group_size: Annotated[int, Field(ge=2)] | Literal["channel"] = Field(
        128, description="consecutive inputs that share scales; `channel`: the row"
    )
    levels: Literal["free", "uniform"] = Field(
        "free",
        description="`uniform`: evenly spaced, exactly what `rtn` or `gptq` round to, coded for the look-up kernel",
    )
    objective: Objective = Field(
        "output",
        description="what is minimised: the change of the weights (no calibration), of the weights weighted by their "
        "inputs, or of the output, where groups not yet coded make up for the error",
    )
    rounds: int = Field(10, ge=0, description="of nearest codes and best scales for them; 0: greedy")
    turns: int = Field(
        2, ge=0, description="with objective `output`, how often scales are refitted to propagated codes"
    )
    offset: bool = Field(False, description="levels need not be symmetric about zero: one more stored number per group")
    damping: float = Field(0.01, ge=0, description="added to the Hessian's diagonal, relative to its mean")

    @model_validator(mode="after")
    def _uniform_levels(self) -> Self:
        if self.levels == "uniform" and (self.bits == 1 or self.objective == "inputs"):
            raise ValueError("uniform levels need 2 bits or more, and objective `weights` (rtn) or `output` (gptq)")
        return self

    def grid(self, storage_dtype: torch.dtype) -> BinaryGrid:
        """The grid these keys describe."""
        if self.levels == "uniform":
            return coded_grid(self.integer_grid(storage_dtype))
        size = None if self.group_size == "channel" else self.group_size
        return BinaryGrid(self.bits, size, storage_dtype, storage_dtype if self.offset else None)

    def integer_grid(self, storage_dtype: torch.dtype) -> IntegerGrid:
        """The grid that `uniform` levels lie on."""
        size = None if self.group_size == "channel" else self.group_size
        return IntegerGrid(self.bits, size, not self.offset, scale_dtype=storage_dtype)

    def scheme(self, before: Scheme, storage_dtype: torch.dtype) -> Scheme:
        return replace(before, grid=self.grid(storage_dtype))


def bcq(
    weight: Tensor,
    grid: BinaryGrid,
    *,
    importance: Tensor | None = None,
    rounds: int = 10,
    kept: Tensor | None = None,
) -> BinaryCoded | Masked:
    """Code `weight` (N, K) group by group, each for itself, `rounds` times alternating after a greedy start.

    importance  (K,), not negative: what an error at this input costs; None: the same everywhere
    kept        bool (N, K): weights outside become exactly zero and do not count
    """
    result = Coding(weight.shape, grid)
    for group, members in enumerate(_groups(weight.shape[1], grid)):
        part = weight[:, members].float()
        share = None if importance is None else importance[members]
        if kept is not None:
            share = kept[:, members] * (1.0 if share is None else share)
        levels = fit(part, grid, rounds, share)
        result.put(group, members, levels, Nearest(levels)(part)[0])
    return result.coded(kept)


def bcq_output(
    weight: Tensor,
    gram: Tensor,
    grid: BinaryGrid,
    *,
    rounds: int = 10,
    turns: int = 2,
    damping: float = 0.01,
    kept: Tensor | None = None,
) -> BinaryCoded | Masked:
    """Code `weight` (N, K) for the least change of the output, given `gram` (K, K) of its inputs.

    The most active group comes first, and in it the most active input. Inputs that were never active do not count.
    Weights outside `kept` (bool (N, K)) become exactly zero and their error is compensated like any other. Warns with
    `DampingWarning` when the Gram matrix needs more damping than asked for.
    """
    columns = weight.shape[1]
    width = grid.columns_per_group(columns)
    weight = weight.float().masked_fill(dead_columns(gram), 0)
    visited = visiting_order(gram.diagonal(), width, "group-activation")
    factor, _ = inverse_factor(gram[visited][:, visited], damping)
    current = weight[:, visited].T.contiguous()
    result = Coding(weight.shape, grid)
    start = 0
    while start < columns:
        group = int(visited[start]) // width
        stop = start + min(width, columns - group * width)
        members, inside = visited[start:stop], factor[start:stop, start:stop].contiguous()
        mask = None if kept is None else kept[:, members]
        levels, codes, fixed = refit(current[start:stop], inside, grid, rounds, turns, mask)
        result.put(group, members, levels, codes)
        errors = torch.linalg.solve_triangular(inside.T, current[start:stop] - fixed, upper=False)
        current[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
        start = stop
    return result.coded(kept)


def linear(given: LinearInput, options: BCQOptions) -> BinaryCoded | Masked:
    """Code one linear, or the stacked rows of several that share their inputs."""
    if options.levels == "uniform":
        return _uniform(given, options)
    grid = options.grid(given.storage_dtype)
    if options.objective == "output":
        return bcq_output(
            given.weight,
            given.statistics[Gram].value,
            grid,
            rounds=options.rounds,
            turns=options.turns,
            damping=options.damping,
            kept=given.kept,
        )
    importance = given.statistics[ColumnNorm].value if options.objective == "inputs" else None
    return bcq(given.weight, grid, importance=importance, rounds=options.rounds, kept=given.kept)


def needs(options: BCQOptions) -> tuple[StatisticType, ...]:
    """What the objective looks at."""
    return {"weights": (), "inputs": (ColumnNorm,), "output": (Gram,)}[options.objective]


def _uniform(given: LinearInput, options: BCQOptions) -> BinaryCoded | Masked:
    grid = options.integer_grid(given.storage_dtype)
    if options.objective == "output":
        gram = given.statistics[Gram].value
        rounded = gptq(given.weight, gram, grid, damping=options.damping, kept=given.kept)
    else:
        rounded = rtn(given.weight, grid, kept=given.kept)
    values = rounded.values if isinstance(rounded, Masked) else rounded
    assert isinstance(values, Quantized)  # a mask was put around codes, never around dense values
    return from_integer(values) if given.kept is None else Masked(from_integer(values), given.kept)


def _groups(columns: int, grid: BinaryGrid) -> list[slice]:
    width = grid.columns_per_group(columns)
    return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]
