"""A quantised weight and a product of low rank that makes up for its error (LQER, EoRA).

    W ~ Q + L R        E = W - Q        minimise |(E - L R) X|^2:   L R = U_r U_r^T E

with U_r the top eigenvectors of E G E^T, G = X X^T: SVD-LLM's closed form, applied to the error. Without calibration it
is the SVD of the error. The factors may be rounded to a grid themselves: then R is rounded first and L is fitted
again, by least squares, to what R became, and rounded with the same care.

    bytes = codes and scales of Q  +  r (N + K) values of L and R

More `rounds` quantise W - L R and correct again (CALDERA, LoftQ); the best round counts.

Worked example, r = 1, integers as the grid, G = I: W = [[1.4, 2.4], [0.6, 3.0]]: Q = [[1, 2], [1, 3]], E = [[.4, .4],
[-.4, 0]]. E E^T = [[.32, -.16], [-.16, .16]] has the eigenvalues .419 and .061; the error falls from .48 to .061.

Source: Zhang et al. 2024, "LQER: Low-Rank Quantization Error Reconstruction for LLMs" (arXiv:2402.02446); Liu et al.
2024, "EoRA" (arXiv:2410.21271), whose eigenspace projection this is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from penjing.methods.base import GridOptions, LinearInput
from penjing.methods.low_rank.svd import truncated
from penjing.methods.low_rank.svd_llm import output_basis
from penjing.methods.quantization.gptq import gptq
from penjing.methods.quantization.rtn import rtn
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Corrected, Dense, LowRank, Masked, Quantized, Scheme
from penjing.statistics import Gram, StatisticType

Round = Callable[[Tensor], Quantized | Masked]
"""fp32 (N, K) -> its codes."""


class ResidualOptions(GridOptions):
    """Recipe keys of quantisation with a correction of low rank."""

    rank: int = Field(32, ge=1, description="of the correction")
    base: Literal["rtn", "gptq"] = Field("gptq", description="how the weight itself is rounded")
    objective: Literal["output", "weights"] = Field(
        "output", description="what the correction minimises: the error of the output, or that of the weights"
    )
    factor_bits: int | None = Field(
        8, ge=2, le=8, description="bits of the factors, a scale per row; none: not rounded"
    )
    rounds: int = Field(1, ge=1, description="of rounding what the correction leaves, and correcting what is lost")

    @model_validator(mode="after")
    def _needs_no_text(self) -> Self:
        if self.base == "gptq" and self.objective == "weights":
            raise ValueError("gptq looks at the inputs anyway; use objective `output`, or base `rtn`")
        return self

    def factor_grid(self, storage_dtype: torch.dtype) -> IntegerGrid | None:
        """The grid of both factors; None when they stay as they are."""
        return None if self.factor_bits is None else IntegerGrid(self.factor_bits, None, scale_dtype=storage_dtype)

    def scheme(self, before: Scheme, storage_dtype: torch.dtype) -> Scheme:
        grid, factors = self.grid(storage_dtype), self.factor_grid(storage_dtype)
        return replace(before, grid=grid, correction=self.rank, correction_grid=factors)

    def declines(self, shape: tuple[int, ...]) -> str:
        """Where the correction alone would be a full matrix."""
        if self.rank < min(shape):
            return ""
        return f"a correction of rank {self.rank} is as large as the matrix, {shape[0]} x {shape[1]}"


def correction(
    error: Tensor, gram: Tensor | None, rank: int, grid: IntegerGrid | None, storage_dtype: torch.dtype
) -> LowRank:
    """The product of (N, rank) and (rank, K) closest to `error` (N, K): of its outputs where `gram` (K, K) is given."""
    if gram is None:
        left, right = truncated(error, rank)
    else:
        left = output_basis(error, gram, rank)
        right = left.T @ error.double()
    if grid is None:
        return LowRank(Dense(left.to(storage_dtype).contiguous()), Dense(right.to(storage_dtype).contiguous()))
    size = right.norm(dim=1).clamp(min=torch.finfo(torch.float32).tiny)
    rounded = _rounded(right / size.unsqueeze(1), grid)  # a row's size goes to the left factor
    seen = rounded.dense().double()
    weighted = seen if gram is None else seen @ gram.double()
    left = error.double() @ weighted.T @ torch.linalg.pinv(weighted @ seen.T, rtol=1e-10, hermitian=True)
    return LowRank(_rounded(left, grid), rounded)


def _rounded(factor: Tensor, grid: IntegerGrid) -> Quantized:
    codes = rtn(factor.float(), grid)
    assert isinstance(codes, Quantized)  # nothing was pruned
    return codes


def residual(
    weight: Tensor,
    quantise: Round,
    gram: Tensor | None,
    rank: int,
    *,
    factor_grid: IntegerGrid | None = None,
    rounds: int = 1,
    storage_dtype: torch.dtype = torch.bfloat16,
) -> Corrected:
    """`weight` (N, K) as `quantise` of it plus a correction of `rank`; `gram` (K, K) as in `correction`."""
    best, least, added = None, float("inf"), torch.zeros_like(weight)
    for _ in range(rounds):
        base = quantise(weight - added)
        found = Corrected(base, correction(weight - base.dense(), gram, rank, factor_grid, storage_dtype))
        lost = (weight - found.dense()).double()
        loss = float(((lost if gram is None else lost @ gram.double()) * lost).sum())
        if best is None or loss < least:
            best, least = found, loss
        added = found.correction.dense()
    assert best is not None
    return best


def linear(given: LinearInput, options: ResidualOptions) -> Corrected:
    """Quantise and correct one linear."""
    grid, dtype, kept = options.grid(given.storage_dtype), given.storage_dtype, given.kept
    gram = given.statistics[Gram].value if options.objective == "output" else None

    def quantise(weight: Tensor) -> Quantized | Masked:
        if options.base == "rtn" or gram is None:
            return rtn(weight, grid, kept=kept)
        return gptq(weight, gram, grid, kept=kept)

    return residual(
        given.weight,
        quantise,
        gram,
        options.rank,
        factor_grid=options.factor_grid(dtype),
        rounds=options.rounds,
        storage_dtype=dtype,
    )


def needs(options: ResidualOptions) -> tuple[StatisticType, ...]:
    """Gram matrices, where the output counts."""
    return (Gram,) if options.objective == "output" else ()
