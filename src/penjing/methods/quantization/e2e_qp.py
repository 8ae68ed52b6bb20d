"""End-to-end training of quantisation parameters: codes stay, scales (and norms) bring the logits back.

Every scale s of the finished model gets a factor f, first 1, and so does every weight of a norm. All are trained
together, through the whole model, to bring its next-token distribution q to that of the dense model, p:

    w_hat = store(s f) * (code - zero)            minimise   mean over tokens of  KL(p || q) = sum_v p_v log(p_v / q_v)

by Adam with a cosine schedule; `store` rounds to the type scales are stored in, with the gradient of the identity. No
byte is added and no code changes, so the result runs wherever the model before it ran. It undoes what methods that look
at one layer or block at a time cannot see: errors that add up from block to block.

Where scales are whole numbers times one number per 256 inputs (K-quants), that number gets the factor; minima stay.
Steps of Adam are as long for every parameter, and norms of one model have weights of 0.03 and of 3: factors suit both.

Worked example. One weight, code 3, s = 0.5, so w_hat = 1.5. If the logits ask for 1.6, f rises to 1.067.

Source: Chen et al. 2024, "EfficientQAT" (arXiv:2407.11062), section 3.3 (E2E-QP), with the dense model's distribution
in place of the next token as the target, and norms trained too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeGuard

import torch
from pydantic import Field
from torch import Tensor

from penjing.methods.base import ModelTask, Options, Tuned
from penjing.methods.learning import StraightThrough, batches
from penjing.numerics.scale_search import free_scales
from penjing.representations import Masked, Quantized, Representation


class E2EOptions(Options):
    """Recipe keys of E2E-QP."""

    iterations: int = Field(64, ge=1, description="steps of training")
    batch_size: int = Field(4, ge=1, description="windows per step")
    learning_rate: float = Field(1e-3, gt=0, description="of the factors on scales, at its highest")
    norms: bool = Field(True, description="also train the weights of norms inside the blocks")
    seed: int = Field(0, ge=0, description="chooses the windows of each step")


WARM_UP = 0.1
"""Share of the steps in which the learning rate rises."""


def rate(step: int, steps: int) -> float:
    """Share of the highest learning rate at `step` of `steps`: a linear rise, then a cosine to zero."""
    rising = min(1.0, (step + 1) / max(1.0, WARM_UP * steps))
    return rising * 0.5 * (1 + math.cos(math.pi * step / steps))


@dataclass(frozen=True)
class Scaled:
    """A quantised weight whose scales can be trained.

    factor  one for each stored number: (N, G), or (N, S) where groups of a super-block share one; first 1
    """

    weight: Quantized
    kept: Tensor | None
    factor: Tensor

    @classmethod
    def of(cls, weight: Quantized | Masked) -> Scaled:
        """The weight as it is."""
        values, kept = (weight.values, weight.kept) if isinstance(weight, Masked) else (weight, None)
        assert isinstance(values, Quantized)
        return cls(values, kept, torch.ones(cls._stored(values).shape).requires_grad_())

    @staticmethod
    def _stored(weight: Quantized) -> Tensor:
        """The numbers that a file holds of the scales."""
        return weight.scale if weight.scale_codes is None else weight.scale_codes.shared

    def stored(self) -> Tensor:
        """The trained numbers as they will be stored, in fp32, differentiable."""
        before = self._stored(self.weight)
        free = before.float() * self.factor
        return StraightThrough.apply(free, free.detach().to(before.dtype).float())

    def scale(self) -> Tensor:
        """The scales (N, G) that the stored numbers stand for, in fp32, differentiable."""
        coded, stored = self.weight.scale_codes, self.stored()
        if coded is None:
            return stored
        return coded.codes.float() * stored.repeat_interleave(coded.codes.shape[1] // stored.shape[1], 1)

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The decoded weight (N, K), differentiable."""
        decoded = replace(self.weight, scale=self.scale()).dense(dtype)
        return decoded if self.kept is None else decoded * self.kept

    def result(self) -> Quantized | Masked:
        """The weight with its trained scales."""
        coded = self.weight.scale_codes
        if coded is not None:
            coded = replace(coded, shared=self.stored().detach().to(coded.shared.dtype))
        scale = self.scale().detach().to(self.weight.scale.dtype)
        weight = replace(self.weight, scale=scale, scale_codes=coded)
        return weight if self.kept is None else Masked(weight, self.kept)


def trainable(weight: Representation) -> TypeGuard[Quantized | Masked]:
    """Whether a weight has scales that are stored as they are, or share numbers that are."""
    values = weight.values if isinstance(weight, Masked) else weight
    return isinstance(values, Quantized) and free_scales(values.grid)


def e2e_qp(task: ModelTask, options: E2EOptions, report: Callable[[int, float], None]) -> Tuned:
    """Train and return what changed; `report` hears the step and its loss in nats per token."""
    scaled = {name: Scaled.of(weight) for name, weight in task.weights.items() if trainable(weight)}
    factors = {name: torch.ones_like(value).requires_grad_() for name, value in task.norms.items() if options.norms}
    parameters = [*(weight.factor for weight in scaled.values()), *factors.values()]
    optimizer = torch.optim.Adam(parameters, lr=options.learning_rate, betas=(0.9, 0.95))

    def given(name: str) -> Tensor | None:
        if name in scaled:
            return scaled[name].dense(task.dtype)
        return task.norms[name] * factors[name] if name in factors else None

    schedule = batches(task.windows, options.batch_size, options.iterations, options.seed)
    for step, batch in enumerate(schedule):
        for group in optimizer.param_groups:
            group["lr"] = options.learning_rate * rate(step, options.iterations)
        loss = task.loss(batch, given)
        optimizer.step()
        optimizer.zero_grad()
        report(step, loss)
    weights: Mapping[str, Representation] = {name: weight.result() for name, weight in scaled.items()}
    return Tuned(weights, {name: (task.norms[name] * factor).detach() for name, factor in factors.items()})


def tune(task: ModelTask, options: E2EOptions, report: Callable[[int, float], None]) -> Tuned:
    """The method's `tune` shape."""
    with torch.enable_grad():
        return e2e_qp(task, options, report)
