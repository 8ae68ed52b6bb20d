"""What methods that learn share: which windows make a batch, the loss of a block's output, gradients past rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from penjing.methods.base import BlockTask
from penjing.representations import Representation

MICRO_TOKENS = 2048
"""Tokens whose activations are kept for one backward pass."""


def batches(windows: int, size: int, steps: int, seed: int) -> Iterator[list[int]]:
    """`steps` batches of `size` of the numbers below `windows`; each number comes once before any comes again."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, windows)
    order: list[int] = []
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(windows, generator=generator).tolist()
        yield order[:size]
        order = order[size:]


def block_loss(task: BlockTask, weights: Mapping[str, Tensor], batch: Sequence[int]) -> float:
    """Mean squared difference between the block's outputs over some windows and those it should have.

    weights  (N, K) of linears by name, with a graph behind them; the loss is sent back through it
    """
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    windows = max(1, MICRO_TOKENS // task.inputs.shape[1])
    elements = len(batch) * task.inputs[0].numel()
    total = 0.0
    for start in range(0, len(batch), windows):
        chosen = list(batch[start : start + windows])
        difference = task.run(task.inputs[chosen], leaves).float() - task.targets[chosen].float()
        loss = difference.square().sum() / elements
        loss.backward()
        total += loss.item()
    torch.autograd.backward(list(weights.values()), [leaf.grad for leaf in leaves.values()])
    return total


class StraightThrough(torch.autograd.Function):
    """A value in place of another, with the gradient of the identity."""

    @staticmethod
    def forward(context: object, value: Tensor, replacement: Tensor) -> Tensor:
        return replacement

    @staticmethod
    def backward(context: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def straight_through(weight: Tensor, represent: Callable[[Tensor], Representation]) -> Tensor:
    """The values (N, K) that `represent` makes of `weight` (N, K), with the gradient of the identity.

    Training a weight through it, and handing the result to `represent` at the end, is quantisation-aware training with
    any method that looks at weights only: `lambda weight: ternary(weight, TernaryGrid())`, say.
    """
    return StraightThrough.apply(weight, represent(weight.detach()).dense().to(weight.dtype))
