"""A teacher's distribution cut to its k likeliest tokens and one bucket for all others.

    P = (p_1, ..., p_k, 1 - sum)            Q = (q_1, ..., q_k, 1 - sum q)  at the same tokens

and KL(P || Q) in place of KL(p || q). Merging tokens can only lower a divergence, so it never exceeds the full one, and
for k = V it is the full one. Dropping the tail instead and rescaling the rest, as is often done, teaches the student to
be surer than its teacher; here the mass of the tail is a target too. The tail's logarithm is kept by itself: 1 - sum
would lose it.

Worked example: p = (0.6, 0.3, 0.1), k = 1: P = (0.6, 0.4); q = (0.5, 0.1, 0.4): Q = (0.5, 0.5), KL = 0.0201.

Source: as `topk` losses of several toolkits; the tail bucket follows from the log-sum inequality (Cover, Thomas 2006,
theorem 2.7.1).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from penjing.methods.distillation.tokens import expected, log_probabilities

SMALLEST = -60.0
"""log of the least mass a tail is given: below, it plays no part, and logarithms stay finite."""


class TopK(NamedTuple):
    """A distribution, per token.

    tokens  int (..., k), the likeliest first
    logs    float (..., k), their log-probabilities
    tail    float (...), log of the mass of all others, at least `SMALLEST`
    """

    tokens: Tensor
    logs: Tensor
    tail: Tensor


def top_k(logits: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """From a teacher's logits (..., V); a k beyond V takes all."""
    logs = log_probabilities(logits.detach(), temperature)
    chosen = logs.topk(min(k, logs.shape[-1]), -1)
    return TopK(chosen.indices, chosen.values, _tail(logs, chosen.indices))


def top_k_kl(student: Tensor, teacher: TopK, temperature: float = 1.0) -> Tensor:
    """KL(P || Q) per token: the student's logits (..., V) -> (...)."""
    logs = log_probabilities(student, temperature)
    tokens = teacher.tokens.long()
    p, tail = teacher.logs.to(logs.dtype), teacher.tail.to(logs.dtype)
    inside = expected(p.exp(), p) - expected(p.exp(), logs.gather(-1, tokens))
    return inside + tail.exp() * (tail - _tail(logs, tokens))


def _tail(logs: Tensor, tokens: Tensor) -> Tensor:
    """log of the mass outside `tokens`, differentiable."""
    rest = logs.scatter(-1, tokens, -torch.inf).logsumexp(-1)
    return torch.where(rest > SMALLEST, rest, torch.full_like(rest, SMALLEST))
