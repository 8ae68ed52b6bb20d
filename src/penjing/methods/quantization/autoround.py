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

The authors clip both ends of an asymmetric group separately; here one factor moves scale and zero point stays.

Source: Cheng et al. 2024, "Optimize Weight Rounding via Signed Gradient Descent" (arXiv:2309.05516), eq. 3-6.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pydantic import Field, field_validator
from torch import Tensor

from penjing.methods.base import BlockTask, GridOptions, GroupSize
from penjing.methods.learning import StraightThrough, batches, block_loss
from penjing.methods.results import quantized, with_mask
from penjing.numerics.grids import IntegerGrid, ScaleRule
from penjing.representations import Masked, Quantized


class AutoRoundOptions(GridOptions):
    """Recipe keys of AutoRound."""

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


@dataclass
class Rounding:
    """The trainable rounding of one weight (N, K).

    offset  V (N, K)
    factor  c (N, G)
    kept    bool (N, K) of an earlier pruning step, or None
    """

    weight: Tensor
    grid: IntegerGrid
    scale: Tensor
    zero: Tensor
    offset: Tensor
    factor: Tensor
    kept: Tensor | None

    @classmethod
    def of(cls, weight: Tensor, grid: IntegerGrid, kept: Tensor | None = None) -> Rounding:
        """Round-to-nearest as the start."""
        weight = weight.float() if kept is None else weight.float() * kept
        scale, zero = grid.fit_rows(weight)
        offset, factor = torch.zeros_like(weight), torch.ones_like(scale)
        return cls(weight, grid, scale, zero, offset.requires_grad_(), factor.requires_grad_(), kept)

    def values(self) -> tuple[Tensor, Tensor, Tensor]:
        """The decoded weight (N, K), its codes (N, K) and scales (N, G), all differentiable."""
        columns = self.weight.shape[1]
        scale = self._stored(self.scale * self.factor)
        spread, zero = self.grid.spread(scale, columns), self.grid.spread(self.zero, columns)
        ratio = self.weight / spread + self.offset
        codes = StraightThrough.apply(ratio, ratio.detach().round()) + zero
        codes = codes.clamp(self.grid.low, self.grid.high)
        weight = (codes - zero) * spread
        return (weight if self.kept is None else weight * self.kept), codes, scale

    def _stored(self, scale: Tensor) -> Tensor:
        """The scale as it will be stored; the gradient sees through."""
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
        return with_mask(quantized(codes, scale, self.zero, self.grid), self.kept)


def autoround(task: BlockTask, options: AutoRoundOptions) -> dict[str, Quantized | Masked]:
    """Quantise all linears of a block together. Needs no statistics, only the block's inputs and wanted outputs."""
    grid = options.grid(task.storage_dtype)
    linears = {name: Rounding.of(weight, grid, task.kept.get(name)) for name, weight in task.weights.items()}
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
