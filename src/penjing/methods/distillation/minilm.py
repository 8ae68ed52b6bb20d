"""MiniLM: how the tokens of one layer relate to each other, whatever the widths of student and teacher.

For states X of a layer, cut into R relation heads of d = D / R channels each, every token has a distribution over the
tokens it may see:

    R_XX = softmax(X X^T / sqrt(d))          L = sum over X of the mean over heads and tokens of KL(R of teacher || R)

MiniLM takes the attention itself (Q K^T) and the relation of values (V V^T) of the last layer, with as many heads in
both models. MiniLMv2 takes Q Q^T, K K^T, V V^T, with all heads joined and cut anew into a number of relation heads that
both widths allow, so that heads and widths may differ; the best teacher layer is then an upper middle one for large
models. In a decoder a token relates to itself and those before it.

Worked example: one head of one channel, causal, X = (1, 1): token 1 sees itself, token 2 both, each with 1/2.

Sources: Wang et al. 2020, "MiniLM" (arXiv:2002.10957), eq. 4-6; Wang et al. 2021, "MiniLMv2" (arXiv:2012.15828), eq. 5.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from penjing.methods.distillation.attention import Attended, attention_scores
from penjing.methods.distillation.tokens import mean_over, wide


def relations(states: Tensor, heads: int, pairs: Tensor) -> Tensor:
    """log R_XX (B, heads, T, T) of states (B, H, T, d), all H d channels joined and cut into `heads`; fp32.

    pairs  bool (B, T, T) of `visible_pairs`; the rest has -inf, the row of a token that sees none zeros

    Raises ValueError when the channels are no multiple of `heads`.
    """
    joined = states.transpose(1, 2).flatten(2)
    if joined.shape[-1] % heads:
        raise ValueError(f"{joined.shape[-1]} channels cannot be cut into {heads} relation heads")
    cut = wide(joined).unflatten(-1, (heads, -1)).transpose(1, 2)
    return masked_log_softmax(cut @ cut.transpose(-1, -2) / math.sqrt(cut.shape[-1]), pairs)


def masked_log_softmax(scores: Tensor, pairs: Tensor) -> Tensor:
    """log softmax of (B, H, T, T) over visible pairs (B, T, T); 0 in rows without any, -inf on hidden pairs."""
    empty = ~pairs.any(-1, keepdim=True)
    return scores.masked_fill(~(pairs | empty)[:, None], -math.inf).log_softmax(-1).masked_fill(empty[:, None], 0)


def relation_kl(student: Tensor, teacher: Tensor, pairs: Tensor) -> Tensor:
    """KL(teacher || student) of two log relations (B, H, T, T), mean over heads and over tokens that see any."""
    teacher = teacher.detach()
    hidden = ~pairs[:, None]
    difference = teacher.masked_fill(hidden, 0) - student.masked_fill(hidden, 0)
    per_token = torch.where(hidden, 0, teacher.exp() * difference).sum(-1)
    return mean_over(per_token.mean(1), pairs.any(-1))


def minilm_loss(student: Attended, teacher: Attended, pairs: Tensor) -> Tensor:
    """MiniLM: attention and value relation of one layer each. Raises ValueError when the numbers of heads differ."""
    heads = (student.query.shape[1], teacher.query.shape[1])
    if heads[0] != heads[1]:
        raise ValueError(f"MiniLM compares as many heads; {heads[0]} and {heads[1]} need relation heads (MiniLMv2)")
    attention = [masked_log_softmax(attention_scores(layer), pairs) for layer in (student, teacher)]
    return relation_kl(attention[0], attention[1], pairs) + _relation_loss(student.value, teacher.value, pairs, None)


def minilm_v2_loss(student: Attended, teacher: Attended, pairs: Tensor, heads: int) -> Tensor:
    """MiniLMv2: relations among queries, keys and values, in `heads` relation heads."""
    parts = ((student.query, teacher.query), (student.key, teacher.key), (student.value, teacher.value))
    return torch.stack([_relation_loss(of_student, of_teacher, pairs, heads) for of_student, of_teacher in parts]).sum()


def _relation_loss(student: Tensor, teacher: Tensor, pairs: Tensor, heads: int | None) -> Tensor:
    """Of states (B, H, T, d); without `heads`, those that are there."""
    if heads is None and student.shape[1] != teacher.shape[1]:
        raise ValueError(f"{student.shape[1]} and {teacher.shape[1]} value heads need relation heads (MiniLMv2)")
    cut = student.shape[1] if heads is None else heads
    return relation_kl(relations(student, cut, pairs), relations(teacher, cut, pairs), pairs)
