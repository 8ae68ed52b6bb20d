"""The Kullback-Leibler divergence of logits, with its gradient in closed form.

    KL(p || q) = sum_v p_v (log p_v - log q_v)        p = softmax(teacher / T)        q = softmax(student / T)

The gradient by the student's logits is (q - p) / T. It is all that is kept for the backward pass: autograd would keep
five matrices of tokens x vocabulary, and walk over each of them again.

Worked example. Teacher (0, 0), student (log 3, 0), T = 1: KL = log(2 / sqrt(3)) = 0.1438, the gradient (1/4, -1/4).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ROWS = 256
"""Rows whose distributions are in memory at once."""


class _ForwardKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
        gradient = torch.empty_like(student) if ctx.needs_input_grad[0] else None
        values = []
        for start in range(0, len(student), ROWS):
            rows = slice(start, start + ROWS)
            log_p, log_q = (_log_softmax(logits[rows], temperature) for logits in (teacher, student))
            p = log_p.exp()
            difference = log_p.sub_(log_q)
            value = torch.linalg.vecdot(p, difference)
            if value.isnan().any():  # what p excludes counts nothing, even if it is infinite
                value = torch.linalg.vecdot(p, difference.masked_fill_(p == 0, 0))
            values.append(value)
            if gradient is not None:
                gradient[rows] = log_q.exp_().sub_(p)
        ctx.save_for_backward(gradient)  # and not as an attribute: checkpointing drops what is saved, and only that
        ctx.temperature = temperature
        return torch.cat(values) if values else student.new_zeros(0, dtype=_wide(student))

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


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    logits = logits.to(_wide(logits))
    return (logits / temperature if temperature != 1 else logits).log_softmax(-1)


def _wide(logits: Tensor) -> torch.dtype:
    return torch.promote_types(logits.dtype, torch.float32)
