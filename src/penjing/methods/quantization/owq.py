"""OWQ: the columns that hurt most stay dense, the others are rounded as in GPTQ, and the dense ones make up for them.

An input with large activations multiplies the rounding error of its column. With H = X X^T, the sensitivity of column j
is the loss that rounding it to nearest would cause by itself,

    sensitivity_j = H_jj * ||W_:j - Q(W)_:j||^2

The `columns` most sensitive ones, the weak columns, are visited last in the sweep of GPTQ (`penjing.numerics.sweep`)
and stay in the storage dtype: they take up what the rounded columns left over, and so end up different from the
original. Scales are fitted to the other columns only: a weak column often holds the largest weights of its group.

Worked example. W = [[0.6, 0.8]], H = [[2, 1], [1, 1]] (undamped), a grid of whole numbers, one weak column:

    sensitivity = [2 * 0.4^2, 1 * 0.2^2] = [0.32, 0.04]        column 0 is weak, column 1 is rounded first: 0.8 -> 1
    w_0 = 0.6 - (1 - 0.8) H_01 / H_00 = 0.5                      loss = 2 * 0.1^2 - 2 * 0.1 * 0.2 + 0.2^2 = 0.02

GPTQ, which rounds both, has loss 0.32.

`target_bits` counts codes and weak columns, index included, of each matrix by itself; scales come on top. A weak column
adds 16 bits per weight in a 16-bit model to its codes, which stay in the file although they mean nothing, hence about

    columns = K (target_bits - bits) / 16

rounded down. The authors count the codes of weak columns out, and spread the total evenly over the linears of a block
whatever their size; to do that, give each group of linears a step with its own `columns`.

Other differences from the authors' code: scales span the range of a group instead of minimising the plain error of
weights; groups are those of consecutive inputs, fitted before the sweep, so that no index is stored.

Source: Lee et al. 2024, "OWQ" (arXiv:2306.02272), section 4.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from penjing.methods.base import GridOptions, LinearInput
from penjing.methods.quantization.gptq import visiting_order
from penjing.methods.quantization.rtn import rtn
from penjing.methods.results import quantized
from penjing.numerics.cholesky import dead_columns, inverse_factor
from penjing.numerics.grids import IntegerGrid
from penjing.numerics.sweep import block_bounds, sweep
from penjing.representations import Columns, Patched, Scheme
from penjing.statistics import Gram

INDEX_BITS = 32
"""What the number of a weak column takes."""


class OWQOptions(GridOptions):
    """Recipe keys of OWQ."""

    bits: int = Field(3, ge=2, le=8, description="bits per rounded weight")
    columns: int | None = Field(None, ge=1, description="weak columns of every matrix, kept dense")
    target_bits: float | None = Field(
        None, gt=2, description="instead of `columns`: bits per weight of codes and weak columns together"
    )
    block_size: int = Field(128, ge=1, description="columns whose updates are batched; changes speed, not the result")
    damping: float = Field(0.01, ge=0, description="added to the Hessian's diagonal, relative to its mean")
    order: Literal["natural", "activation"] = Field(
        "activation", description="which inputs are rounded first: as they come, or the most active first"
    )

    @model_validator(mode="after")
    def _one_budget(self) -> Self:
        if (self.columns is None) == (self.target_bits is None):
            raise ValueError("give either `columns` or `target_bits`")
        return self

    def for_matrix(self, shape: tuple[int, ...], storage_dtype: torch.dtype) -> Self:
        """With `columns` in place of `target_bits`; ValueError if none or all of the columns would be weak."""
        rows, inputs = shape
        count = self.columns
        if self.target_bits is not None:
            dense = rows * 8 * storage_dtype.itemsize + INDEX_BITS
            count = int(inputs * rows * (self.target_bits - self.bits) / dense)
            if count < 1:
                needed = self.bits + dense / (inputs * rows)
                raise ValueError(
                    f"target_bits {self.target_bits:g} has no room for a dense column beside {self.bits}-bit codes; "
                    f"raise it to {needed + 0.005:.2f}, or give `columns`"
                )
        if count is None or count >= inputs:
            raise ValueError(f"{count} dense columns leave none of its {inputs} inputs to round; give fewer")
        return self.model_copy(update={"columns": count, "target_bits": None})

    def scheme(self, before: Scheme, storage_dtype: torch.dtype) -> Scheme:
        """Adds grid and dense columns, of options made `for_matrix`; ValueError after a pruning step."""
        if before.sparsity:
            raise ValueError("owq keeps whole columns and would fill what an earlier step pruned; use gptq")
        return replace(super().scheme(before, storage_dtype), columns=self.columns or 0)


def owq(
    weight: Tensor,
    gram: Tensor,
    grid: IntegerGrid,
    columns: int,
    *,
    block_size: int = 128,
    damping: float = 0.01,
    order: Literal["natural", "activation"] = "activation",
    storage_dtype: torch.dtype = torch.bfloat16,
) -> Patched:
    """Quantise `weight` (N, K) but for `columns` of its columns, given `gram` (K, K), the sum of x x^T of its inputs.

    Inputs that were never active get zero weights. Warns with `DampingWarning` when the Gram matrix needs more damping
    than asked for.
    """
    weight = weight.float().masked_fill(dead_columns(gram), 0)
    weak = weak_columns(weight, gram.diagonal(), grid, columns)
    visited = visiting_order(gram.diagonal(), 1, order)
    visited = torch.cat([visited[~weak[visited]], weak.nonzero().squeeze(1)])
    factor, _ = inverse_factor(gram[visited][:, visited], damping)
    rounded = len(visited) - columns

    current = weight[:, visited].T.contiguous()
    # Zero lies on every grid: a zeroed column leaves the scale to the others.
    scale, zero = (part.T.contiguous() for part in grid.fit_rows(weight.masked_fill(weak, 0)))
    codes = torch.zeros(current.shape, dtype=torch.int8)
    groups, places = (visited // grid.columns_per_group(len(visited))).tolist(), visited.tolist()

    def fix_column(position: int, column: Tensor) -> Tensor:
        if position >= rounded:
            return column.to(storage_dtype).float()
        group = groups[position]
        code = grid.encode(column, scale[group], zero[group])
        codes[places[position]] = code
        return grid.decode(code, scale[group], zero[group])

    sweep(current, factor, block_bounds(len(visited), block_size), fix_column)
    base = quantized(codes.T.contiguous(), scale.T.contiguous(), zero.T.contiguous(), grid)
    return Patched(base, Columns(visited[rounded:].int(), current[rounded:].T.to(storage_dtype).contiguous()))


def weak_columns(weight: Tensor, activity: Tensor, grid: IntegerGrid, count: int) -> Tensor:
    """Bool (K,): the `count` most sensitive columns of `weight` (N, K), given the `activity` (K,) of each: diag(H)."""
    damage = (weight - rtn(weight, grid).dense()).square().sum(0)
    sensitivity = damage * activity if activity.any() else damage
    chosen = sensitivity.argsort(descending=True, stable=True)[:count]
    return torch.zeros(len(activity), dtype=torch.bool).index_fill_(0, chosen, True)


def linear(given: LinearInput, options: OWQOptions) -> Patched:
    """Quantise one linear."""
    resolved = options.for_matrix(tuple(given.weight.shape), given.storage_dtype)
    return owq(
        given.weight,
        given.statistics[Gram].value,
        options.grid(given.storage_dtype),
        resolved.columns or 0,
        block_size=options.block_size,
        damping=options.damping,
        order=options.order,
        storage_dtype=given.storage_dtype,
    )
