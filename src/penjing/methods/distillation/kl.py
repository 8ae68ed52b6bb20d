"""Forward and reverse Kullback-Leibler divergence between the teacher's distribution p and the student's q.

    forward   KL(p || q) = sum_v p_v (log p_v - log q_v)        gradient by the student's logits:  q - p
    reverse   KL(q || p) = sum_v q_v (log q_v - log p_v)        q_v ((log q_v - log p_v) - KL(q || p))

Forward KL spreads the student over all that the teacher may say; reverse KL has it say only what the teacher finds
likely, which is better for a student too small to say it all, when its own sequences are judged (MiniLLM). Both are
computed from log-softmax in fp32: log of an exponential would lose the unlikely tokens. Of forward KL, q - p is made
with the value and is all that is kept; autograd would keep five matrices of tokens x vocabulary.

With a temperature T both distributions are softmax(logits / T); whoever mixes losses of unequal temperature multiplies
by T^2 (see `soft_labels`), because gradients shrink with 1 / T^2.

Worked example. p = (1/2, 1/2), q = (3/4, 1/4): forward = log(2/sqrt(3)) = 0.1438, reverse = 3/4 log 3/2 + 1/4 log 1/2
= 0.1308.

Source: Kullback, Leibler 1951; as losses of language models Gu et al. 2024 (arXiv:2306.08543), section 2.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from penjing.methods.distillation.tokens import expected, log_probabilities, wide
from penjing.numerics.strips import strips


class _ForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        values = []
        for rows in strips(student):
            log_p, log_q = (log_probabilities(logits[rows], temperature) for logits in (teacher, student))
            p = log_p.exp()
            difference = log_p.sub_(log_q)
            value = torch.linalg.vecdot(p, difference)
            if value.isnan().any():  # something infinite where p is zero
                value = expected(p, difference)
            values.append(value)
            if gradient is not None:
                gradient[rows] = log_q.exp_().sub_(p)
        ctx.save_for_backward(gradient)  # and not as an attribute: checkpointing drops what is saved, and only that
        ctx.temperature = temperature
        return torch.cat(values) if values else wide(student.new_zeros(0))

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * (outer / ctx.temperature)[:, None].to(gradient.dtype), None, None


def forward_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(p || q) in nats per token: logits (..., V) -> (...), fp32 at least. Only the student's have a gradient.

    A token that the teacher excludes (-inf) counts nothing.
    """
    values: Tensor = _ForwardKL.apply(
        *(logits.reshape(-1, logits.shape[-1]) for logits in (student, teacher.detach())), temperature
    )
    return values.reshape(student.shape[:-1])


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q || p) in nats per token: logits (..., V) -> (...). Infinite where the student allows what p excludes."""
    log_p, log_q = log_probabilities(teacher.detach(), temperature), log_probabilities(student, temperature)
    return (log_q.exp() * (log_q - log_p)).sum(-1)
