"""Ternary weights: BitNet b1.58's rule, its exact least-squares version, and both with GPTQ's compensation.

    W_hat = a t        t in {-1, 0, +1}        one a per group, row or matrix (see `penjing.numerics.ternary`)

BitNet b1.58 is `rule: absmean` with `group_size: tensor` and, to run as published, 8-bit inputs: a step may say
`activations: {bits: 8}`. The paper trains a model with these weights; `penjing.methods.learning.straight_through` is
the function to do that with.

objective  weights  nearest of the three values; no calibration
           inputs   scales searched for the least error, weighed by the mean squares of the inputs
           output   the columns not yet coded make up for the error, as in GPTQ

Weights that an earlier step removed stay zero, which is one of the three values: no mask is stored beside the codes.

Worked example: W = [[3, -1, 0.5, 2]], one group. least-squares: a = 2.5, W_hat = [[2.5, 0, 0, 2.5]], error 1.75.
absmean: a = 1.625, W_hat = [[1.625, -1.625, 0, 1.625]], error 2.67.

Source: Ma et al. 2024, "The Era of 1-bit LLMs: All Large Language Models are in 1.58 Bits" (arXiv:2402.17764).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from penjing.methods.base import GroupSize, LinearInput, Options, StatisticType
from penjing.methods.quantization.gptq import gptq
from penjing.methods.quantization.rtn import rtn
from penjing.numerics.scale_search import ScaleSearch
from penjing.numerics.ternary import TernaryGrid, TernaryRule
from penjing.representations import Masked, Quantized, Scheme
from penjing.statistics import ColumnNorm, Gram


class TernaryOptions(Options):
    """Recipe keys of ternary weights."""

    group_size: GroupSize = 128
    rule: TernaryRule = Field("least-squares", description="how a scale follows from the weights of its group")
    objective: Literal["weights", "inputs", "output"] = Field(
        "output",
        description="least change of the weights (no calibration), of the weights weighted by their inputs, or of the "
        "output, where columns not yet coded make up for the error",
    )
    damping: float = Field(0.01, ge=0, description="added to the Hessian's diagonal, relative to its mean")

    def grid(self, storage_dtype: torch.dtype) -> TernaryGrid:
        """The grid these keys describe."""
        size = None if self.group_size == "channel" else self.group_size
        return TernaryGrid(group_size=size, scale_dtype=storage_dtype, rule=self.rule)

    def scheme(self, before: Scheme, storage_dtype: torch.dtype) -> Scheme:
        """Zeros of an earlier pruning step become codes."""
        return replace(before, grid=self.grid(storage_dtype), sparsity=0.0, pattern=None)


def ternary(
    weight: Tensor,
    grid: TernaryGrid,
    *,
    squares: Tensor | None = None,
    gram: Tensor | None = None,
    damping: float = 0.01,
    kept: Tensor | None = None,
) -> Quantized:
    """Code `weight` (N, K) on `grid`.

    squares  (K,), what a squared error at each input costs: scales are searched for the least
    gram     (K, K), sum of outer products of the inputs: errors are compensated column by column
    kept     bool (N, K): weights outside become zero
    """
    if gram is not None:
        search: ScaleSearch = "none" if grid.rule == "absmean" else "diagonal"
        done = gptq(weight, gram, grid, damping=damping, kept=kept, scale_search=search)
    else:
        done = rtn(weight, grid, kept=kept, metric=squares)
    values = done.values if isinstance(done, Masked) else done
    assert isinstance(values, Quantized)  # a mask was put around codes, never around dense values
    return values if kept is None else replace(values, codes=values.codes * kept)


def linear(given: LinearInput, options: TernaryOptions) -> Quantized:
    """Code one linear, or the stacked rows of several."""
    objective = options.objective
    return ternary(
        given.weight,
        options.grid(given.storage_dtype),
        squares=given.statistics[ColumnNorm].value if objective == "inputs" else None,
        gram=given.statistics[Gram].value if objective == "output" else None,
        damping=options.damping,
        kept=given.kept,
    )


def needs(options: TernaryOptions) -> tuple[StatisticType, ...]:
    """What the objective looks at."""
    return {"weights": (), "inputs": (ColumnNorm,), "output": (Gram,)}[options.objective]
