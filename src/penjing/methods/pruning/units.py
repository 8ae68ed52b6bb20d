"""What is known of the units of one coupling when a method says which of them stay.

A unit is a set of channels that can only go together: a neuron of the MLP, a group of attention heads. `rows` of some
linears make its outputs, `columns` of the next linear read them. A score is a number per unit; the highest stay.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from penjing.numerics.masks import keep_largest


@dataclass(frozen=True)
class UnitGradients:
    """Gradients of the loss by the weights of units, shaped like `rows` and `columns` of `Units`.

    columns, rows  mean over windows
    squares        mean over windows of their squares: of `columns` first, then of each of `rows`
    gates          fp32 (U,): mean over windows of |dL / d gate|, with a gate of one on the outputs of each unit
    """

    columns: Tensor
    rows: tuple[Tensor, ...]
    squares: tuple[Tensor, ...]
    gates: Tensor


@dataclass(frozen=True)
class Units:
    """U units of S outputs each, of which a linear with N outputs reads K = U * S inputs.

    columns    fp32 (U, N, S): weights that read them
    rows       fp32 (U, n, D) for each linear that makes them
    gram       fp32 (K, K): X^T X of their outputs over all tokens, unit after unit; None unless asked for
    mean       fp32 (K,): mean of their outputs over tokens
    tokens     how many tokens were seen
    entropy    fp32 (U,): entropy of attention in nats, mean over queries and heads of the unit
    gradients  of the loss by the weights
    """

    columns: Tensor
    rows: tuple[Tensor, ...] = ()
    gram: Tensor | None = None
    mean: Tensor | None = None
    tokens: int = 0
    entropy: Tensor | None = None
    gradients: UnitGradients | None = field(default=None)

    @property
    def power(self) -> Tensor:
        """Sum over tokens of the squares of the outputs, (U, S)."""
        return _there(self.gram).diagonal().view(len(self.columns), -1)


def _there(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError("this score looks at the outputs of units, and none were recorded")
    return tensor


def kept_units(scores: Tensor, drop: int) -> Tensor:
    """Indices (U - drop,), ascending, of all but the `drop` lowest scores (U,); of equals the first go."""
    return keep_largest(scores, drop).nonzero().flatten()


def per_unit(parts: tuple[Tensor, ...], order: int) -> Tensor:
    """Sum over all weights of a unit of |w|^order: fp64 (U,)."""
    return torch.stack([part.double().abs().pow(order).flatten(1).sum(1) for part in parts]).sum(0)
