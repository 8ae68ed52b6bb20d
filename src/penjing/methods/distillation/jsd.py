"""Generalised Jensen-Shannon divergence between teacher p and student q, and training on the student's own sequences.

    m = beta p + (1 - beta) q            JSD_beta = beta KL(p || m) + (1 - beta) KL(q || m)            0 < beta < 1

Divided by beta (1 - beta) it tends to KL(p || q) as beta -> 0 and to KL(q || p) as beta -> 1. The formula itself gives
0 at both ends; there this module returns the two KLs, as GKD defines its loss. beta close to 0 acts as the forward KL,
close to 1 as the reverse, but small, by the factor beta (1 - beta). The mixture is formed in log space.

GKD trains on a batch of the student's own sequences with probability lambda, on the data set's (or the teacher's) with
1 - lambda; no gradient passes through the sampling. lambda = 1 is on-policy distillation.

Worked example, beta = 1/2: p = (1, 0), q = (0, 1), m = (1/2, 1/2): JSD = 1/2 log 2 + 1/2 log 2 = 0.693.

Source: Agarwal et al. 2024, "On-Policy Distillation of Language Models" (arXiv:2306.13649), eq. 1 and algorithm 1.
"""

from __future__ import annotations

import random

from torch import Tensor

from penjing.methods.distillation.kl import forward_kl, reverse_kl
from penjing.methods.distillation.skewed_kl import log_mixture
from penjing.methods.distillation.tokens import expected, log_probabilities


def generalised_jsd(student: Tensor, teacher: Tensor, beta: float = 0.5, temperature: float = 1.0) -> Tensor:
    """JSD_beta per token: logits (..., V) -> (...); 0: forward KL, 1: reverse KL."""
    if beta == 0:
        return forward_kl(student, teacher, temperature)
    if beta == 1:
        return reverse_kl(student, teacher, temperature)
    log_p, log_q = log_probabilities(teacher.detach(), temperature), log_probabilities(student, temperature)
    mixture = log_mixture(log_p, log_q, beta)
    p = log_p.exp()
    of_teacher = expected(p, log_p) - expected(p, mixture)
    of_student = (log_q.exp() * (log_q - mixture)).sum(-1)
    return beta * of_teacher + (1 - beta) * of_student


def own_batches(steps: int, share: float, seed: int) -> list[bool]:
    """For each of `steps` batches whether it holds the student's own sequences; `share` is lambda. The same for the
    same seed, so that an interrupted run continues with the same choice.
    """
    generator = random.Random(seed)
    return [generator.random() < share for _ in range(steps)]
