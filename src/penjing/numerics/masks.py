"""Which weights to keep, by exact counts. Ties are broken by position, so a mask never depends on luck."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def dropped_of(count: int, sparsity: float) -> int:
    """How many of `count` weights a sparsity removes: rounded down, but not fooled by 0.29 * 100 = 28.999..."""
    return math.floor(count * sparsity + 1e-6)


def keep_largest(scores: Tensor, drop: int, kept: Tensor | None = None) -> Tensor:
    """True for all but the `drop` smallest scores along the last axis, for any leading axes.

    Of equal scores the first are dropped first. `kept` (bool, same shape) marks what is still there: what an
    earlier step removed counts as dropped, and stays so.
    """
    if kept is not None:
        scores = scores.masked_fill(~kept, -math.inf)
    order = scores.argsort(dim=-1, stable=True)
    mask = torch.ones_like(scores, dtype=torch.bool).scatter_(-1, order[..., :drop], False)
    return mask if kept is None else mask & kept


def keep_pattern(scores: Tensor, zeros: int, of: int, kept: Tensor | None = None) -> Tensor:
    """N:M mask (N, K): of every `of` consecutive inputs the `zeros` smallest scores go. `of` must divide K."""
    shape = (scores.shape[0], -1, of)
    still = None if kept is None else kept.reshape(shape)
    return keep_largest(scores.reshape(shape), zeros, still).reshape(scores.shape)
