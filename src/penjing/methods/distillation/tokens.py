"""What all losses on tokens share: probabilities in a safe dtype, which tokens count, and the mean over them.

A loss of distillation has one value per predicted token. Logits at position t predict token t + 1, so labels move one
step to the left; prompts, padding and whatever else is not learnt carry the label `IGNORED`. A padding mask cannot be
made from the token's number: in many tokenizers padding and end of text are the same token, and a model that never
learns to end does not end.

The mean is over the tokens that count, all batches of an optimiser step together: gradients that are accumulated over
micro-batches of unequal length need the `count` of them all, not of each.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from penjing.methods.training import IGNORED


class TokenLoss(Protocol):
    """A loss per token: student's and teacher's logits (..., V) -> (...). Only the student's have a gradient."""

    def __call__(self, student: Tensor, teacher: Tensor, /) -> Tensor: ...


def log_probabilities(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) over the last axis, in fp32 at least (fp64 stays)."""
    logits = wide(logits)
    return (logits / temperature if temperature != 1 else logits).log_softmax(-1)


def wide(values: Tensor) -> Tensor:
    """In fp32, unless they are fp64."""
    return values if values.dtype == torch.float64 else values.float()


def expected(weights: Tensor, values: Tensor) -> Tensor:
    """sum_v weights_v values_v over the last axis; where the weight is zero, even an infinite value counts nothing."""
    return torch.where(weights == 0, 0, weights * values.masked_fill(weights == 0, 0)).sum(-1)


class Predictions(NamedTuple):
    """The positions of a batch that predict a token to be learnt.

    at      bool (B, T): position t predicts a token that counts; never true at the last one
    labels  int64 (tokens,), those tokens in the order of `logits[at]`
    """

    at: Tensor
    labels: Tensor


def predictions(labels: Tensor) -> Predictions:
    """From labels (B, T) int64, aligned with the inputs and `IGNORED` where nothing is learnt."""
    at = torch.zeros_like(labels, dtype=torch.bool)
    at[:, :-1] = labels[:, 1:] != IGNORED
    return Predictions(at, labels[:, 1:][at[:, :-1]])


def masked_labels(tokens: Tensor, attention: Tensor, prompt_lengths: Tensor | None = None) -> Tensor:
    """Labels (B, T) for tokens (B, T): `IGNORED` where `attention` is 0 and, right-padded, on the first
    `prompt_lengths` (B,) tokens of each sequence. The end-of-text token stays even if padding has the same number.
    """
    labels = tokens.masked_fill(attention == 0, IGNORED)
    if prompt_lengths is not None:
        inside = torch.arange(tokens.shape[1], device=tokens.device) < prompt_lengths[:, None]
        labels = labels.masked_fill(inside, IGNORED)
    return labels


def mean_over(values: Tensor, at: Tensor | None = None, count: Tensor | float | None = None) -> Tensor:
    """Sum of `values` (...) where `at` is true, over `count`: by default their number. 0 when there are none.

    What lies outside `at` cannot spoil the result, not even NaN.
    """
    if at is not None:
        values = torch.where(at, values, 0)
        count = at.sum().clamp(min=1) if count is None else count
    return values.sum() / (max(values.numel(), 1) if count is None else count)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log q(label) per token: logits (..., V), labels (...) -> (...)."""
    return -log_probabilities(logits).gather(-1, labels[..., None]).squeeze(-1)
