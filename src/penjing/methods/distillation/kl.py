"""Forward and reverse Kullback-Leibler divergence between the teacher's distribution p and the student's q.

    forward   KL(p || q) = sum_v p_v (log p_v - log q_v)        gradient by the student's logits:  q - p
    reverse   KL(q || p) = sum_v q_v (log q_v - log p_v)        q_v ((log q_v - log p_v) - KL(q || p))

Forward KL spreads the student over all that the teacher may say; reverse KL has it say only what the teacher finds
likely, which is better for a student too small to say it all, when its own sequences are judged (MiniLLM). Both are
computed from log-softmax in fp32: log of an exponential would lose the unlikely tokens.

With a temperature T both distributions are softmax(logits / T); whoever mixes losses of unequal temperature multiplies
by T^2 (see `soft_labels`), because gradients shrink with 1 / T^2.

Worked example. p = (1/2, 1/2), q = (3/4, 1/4): forward = log(2/sqrt(3)) = 0.1438, reverse = 3/4 log 3/2 + 1/4 log 1/2
= 0.1308.

Source: Kullback, Leibler 1951; as losses of language models Gu et al. 2024 (arXiv:2306.08543), section 2.
"""

from __future__ import annotations

from torch import Tensor

from penjing.methods.distillation.tokens import log_probabilities
from penjing.numerics.divergence import forward_kl

__all__ = ["forward_kl", "reverse_kl"]


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """KL(q || p) in nats per token: logits (..., V) -> (...). Infinite where the student allows what p excludes."""
    log_p, log_q = log_probabilities(teacher.detach(), temperature), log_probabilities(student, temperature)
    return (log_q.exp() * (log_q - log_p)).sum(-1)
