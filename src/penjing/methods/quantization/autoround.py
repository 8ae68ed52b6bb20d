"""AutoRound: learn for every weight whether to round up or down, and for every group how far to clip.

A rounding offset V (N, K) in [-1/2, 1/2], first 0, and a factor c (N, G) in [1/2, 1], first 1, enter the rounding of
each linear of a block:

    code = clamp(round(w / s + V) + zero, low, high)        s = c * s_0        w_hat = s * (code - zero)

with s_0 and zero fitted to the weight as ever. Both are trained together for all linears of the block so that its
output, on the inputs that the compressed blocks before it give, comes close to that of the dense model:

    minimise  mean (block(x; w_hat) - y)^2        by        p <- p - lr_t sign(gradient),   lr_t = lr (1 - t / T)

The gradient passes `round` as if it were the identity. The sign needs no tuning: T steps of 1/T, halved on average by
the decay, let V cross its whole range. The parameters with the smallest loss of a batch are kept, as by the authors.

Worked example. w = 0.4, s = 1, V = 0 rounds to 0. If the output asks for more, V rises by the learning rate each step;
once V > 0.1 the code is round(0.5+) = 1.

On the grids of GGUF's types the same holds; with a minimum z, code = round((w - z) / s + V), and where scales are whole
numbers times one number per 256 inputs (K-quants), that number gets the factor.

The authors clip both ends of an asymmetric group separately; here one factor moves scale and zero point stays.

Source: Cheng et al. 2024, "Optimize Weight Rounding via Signed Gradient Descent" (arXiv:2309.05516), eq. 3-6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Self

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from penjing.methods.base import BlockTask, GroupSize
from penjing.methods.learning import StraightThrough, batches, block_loss
from penjing.methods.results import Fit, fitted, quantized, with_mask
from penjing.methods.typed_grid import NumberType, TypedGridOptions
from penjing.numerics.grids import IntegerGrid, ScaleRule
from penjing.numerics.scale_codes import ScaleCodes
from penjing.representations import Masked, Quantized


class AutoRoundOptions(TypedGridOptions):
    """Recipe keys of AutoRound."""

    group_size: GroupSize = 128
    scale_rule: ScaleRule = Field("signed-max", description="how a symmetric scale follows from the largest weight")
    iterations: int = Field(200, ge=1, description="steps per block; 50 is light, 1000 the best")
    batch_size: int = Field(8, ge=1, description="windows per step")
    learning_rate: float | None = Field(None, gt=0, description="of the first step; 1 / iterations when not given")
    clip: bool = Field(True, description="also learn how far each group is clipped")
    seed: int = Field(0, ge=0, description="chooses the windows of each step")

    @field_validator("group_size")
    @classmethod
    def _per_row(cls, value: GroupSize) -> GroupSize:
        if value == "tensor":
            raise ValueError("autoround learns scales row by row; use a number or `channel`, not `tensor`")
        return value

    @model_validator(mode="after")
    def _check_evenly_spaced(self) -> Self:
        for kind in (self.type, self.fallback or "int"):
            if not isinstance(type(self).model_construct(type=kind).grid(torch.float16), IntegerGrid):
                raise ValueError(f"autoround learns to round up or down on grids of even steps; type {kind} has none")
        return self

    def _fitting(self, columns: int) -> NumberType:
        """As ever, with the even type in the place of the uneven one of the same size."""
        kind = super()._fitting(columns)
        return "q4_0" if kind == "iq4_nl" else kind


@dataclass
class Rounding:
    """The trainable rounding of one weight (N, K).

    fit     scales and zero points before clipping
    offset  V (N, K)
    factor  c, one for each stored number: (N, G), or (N, S) where groups of a super-block share one
    kept    bool (N, K) of an earlier pruning step, or None
    """

    weight: Tensor
    grid: IntegerGrid
    fit: Fit
    offset: Tensor
    factor: Tensor
    kept: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, grid: IntegerGrid, kept: Tensor | None = None) -> Rounding:
        """Round-to-nearest as the start."""
        weight = weight.float() if kept is None else weight.float() * kept
        fit = fitted(weight, grid)
        stored = fit.scale if fit.scale_codes is None else fit.scale_codes.shared.float()
        offset, factor = torch.zeros_like(weight), torch.ones_like(stored)
        return cls(weight, grid, fit, offset.requires_grad_(), factor.requires_grad_(), kept)

    def values(self) -> tuple[Tensor, Tensor, Tensor]:
        """The decoded weight (N, K), its codes (N, K) and scales (N, G), all differentiable."""
        columns = self.weight.shape[1]
        scale = self._clipped()
        spread, zero = self.grid.spread(scale, columns), self.grid.spread(self.fit.zero, columns)
        start, first = (zero, self.grid.low) if self.grid.offset else (0.0, zero)
        ratio = (self.weight - start) / torch.where(spread == 0, 1, spread) + self.offset
        codes = StraightThrough.apply(ratio, ratio.detach().round()) + first
        codes = codes.clamp(self.grid.low, self.grid.high)
        weight = self.grid.decode(codes, spread, zero)
        return (weight if self.kept is None else weight * self.kept), codes, scale

    def _clipped(self) -> Tensor:
        """Scales (N, G) as they will be stored; the gradient sees through."""
        coded = self.fit.scale_codes
        if coded is None:
            return self._stored(self.fit.scale * self.factor)
        shared = self._stored(coded.shared.float() * self.factor)
        return coded.codes.float() * shared.repeat_interleave(coded.codes.shape[1] // shared.shape[1], 1)

    def _stored(self, scale: Tensor) -> Tensor:
        """In the type of a file; the gradient sees through."""
        return StraightThrough.apply(scale, scale.detach().to(self.grid.scale_dtype).float())

    @torch.no_grad()
    def step(self, rate: float, clip: bool) -> None:
        """One signed step against the gradients, inside the bounds; gradients are cleared."""
        for parameter, low, high in ((self.offset, -0.5, 0.5), (self.factor, 0.5, 1.0)):
            if parameter.grad is not None and (clip or parameter is self.offset):
                parameter.sub_(parameter.grad.sign_(), alpha=rate).clamp_(low, high)
            parameter.grad = None

    @torch.no_grad()
    def result(self) -> Quantized | Masked:
        """The representation."""
        _, codes, scale = self.values()
        coded: ScaleCodes | None = self.fit.scale_codes
        if coded is not None:
            shared = self._stored(coded.shared.float() * self.factor)
            coded = replace(coded, shared=shared.to(coded.shared.dtype))
        done = quantized(codes, scale, self.fit.zero, self.grid, None, coded, self.fit.zero_codes)
        return with_mask(done, self.kept)


def autoround(task: BlockTask, options: AutoRoundOptions) -> dict[str, Quantized | Masked]:
    """Quantise all linears of a block together. Needs no statistics, only the block's inputs and wanted outputs."""
    linears = {}
    for name, weight in task.weights.items():
        grid = options.for_matrix(tuple(weight.shape), task.storage_dtype).grid(task.storage_dtype)
        assert isinstance(grid, IntegerGrid)  # the options allow no other
        linears[name] = Rounding.of(weight, grid, task.kept.get(name))
    best, smallest = _snapshot(linears), float("inf")
    first = options.learning_rate or 1 / options.iterations
    schedule = batches(len(task.inputs), options.batch_size, options.iterations, options.seed)
    for iteration, batch in enumerate(schedule):
        loss = block_loss(task, {name: linear.values()[0] for name, linear in linears.items()}, batch)
        if loss < smallest:
            best, smallest = _snapshot(linears), loss
        for linear in linears.values():
            linear.step(first * (1 - iteration / options.iterations), options.clip)
    for name, linear in linears.items():
        linear.offset, linear.factor = best[name]
    return {name: linear.result() for name, linear in linears.items()}


def _snapshot(linears: Mapping[str, Rounding]) -> dict[str, tuple[Tensor, Tensor]]:
    return {name: (linear.offset.detach().clone(), linear.factor.detach().clone()) for name, linear in linears.items()}


def learn(task: BlockTask, options: AutoRoundOptions) -> dict[str, Quantized | Masked]:
    """The method's `learn` shape."""
    with torch.enable_grad():
        return autoround(task, options)
