"""Transfer of attention maps: which tokens look at which.

    A = Q K^T / sqrt(d) (+ nothing: scores before the softmax)            L = mean (A_s - A_t)^2

over heads and over the pairs (query, key) that exist: a query that is no padding, a key that it may see. The scores are
compared before the softmax, as TinyBERT found to train faster; after it most entries, and so their gradients, are close
to zero. Fast attention kernels return no scores, so they are made again from the queries and keys that went in (after
the rotary embedding), one layer at a time. With fewer key heads than query heads (grouped-query attention) every key
head is read by a group of query heads.

Student and teacher need as many heads. For others see `minilm`, whose relations can be cut into any number of heads.

Source: Jiao et al. 2020, "TinyBERT" (arXiv:1909.10351), eq. 7.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from penjing.methods.distillation.tokens import wide


class Attended(NamedTuple):
    """What one attention layer worked on: query (B, H, T, d), key and value (B, H_kv, T, d), the factor on Q K^T."""

    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float


def visible_pairs(mask: Tensor, causal: bool) -> Tensor:
    """bool (B, T, T): query t may look at key t', neither is padding. `mask` bool (B, T)."""
    pairs = mask[:, :, None] & mask[:, None, :]
    return pairs.tril() if causal else pairs


def attention_scores(layer: Attended) -> Tensor:
    """Q K^T times the layer's scaling, fp32 (B, H, T, T), before any mask and the softmax."""
    groups = layer.query.shape[1] // layer.key.shape[1]
    keys = layer.key.repeat_interleave(groups, 1) if groups > 1 else layer.key
    return wide(layer.query @ keys.transpose(-1, -2)) * layer.scaling


def attention_loss(student: Attended, teacher: Attended, pairs: Tensor) -> Tensor:
    """Mean squared difference of scores over heads and the pairs bool (B, T, T) of `visible_pairs`.

    Raises ValueError when the numbers of heads differ.
    """
    heads = (student.query.shape[1], teacher.query.shape[1])
    if heads[0] != heads[1]:
        raise ValueError(f"attention maps of {heads[0]} and {heads[1]} heads cannot be compared; use MiniLMv2")
    difference = (attention_scores(student) - attention_scores(teacher).detach()).square().mean(1)
    return torch.where(pairs, difference, 0).sum() / pairs.sum().clamp(min=1)
