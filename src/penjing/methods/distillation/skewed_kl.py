"""Skewed KL divergences: the second distribution is mixed with a little of the first, so that none explodes.

    forward   KL(p || a p + (1 - a) q)            reverse   KL(q || (1 - a) p + a q)            a = 0.1

Plain KL is unbounded where the second distribution is almost zero, and its gradients are noisy there; the mixture is at
least `a` times the first one, so the divergence is at most -log a. With a = 0 both are the plain KL. The mixture is
formed from log-probabilities (log-add-exp), since probabilities of 1e-10 matter in a logarithm.

Worked example, a = 1/2: p = (1, 0), q = (0, 1): forward = log(1 / (1/2)) = 0.693, where plain KL is infinite.

DistiLLM also trains on the student's own sequences, drawn from a replay buffer, and draws more of them once the loss on
a held-out set stops falling: `share_of_own` raises the share phi of such batches by `step` whenever the validation loss
of an evaluation exceeds the one before by more than `tolerance`.

Source: Ko et al. 2024, "DistiLLM" (arXiv:2402.03898), eq. 3-5 and algorithm 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from penjing.methods.distillation.tokens import expected, log_probabilities


def skewed_forward_kl(student: Tensor, teacher: Tensor, skew: float = 0.1, temperature: float = 1.0) -> Tensor:
    """KL(p || skew p + (1 - skew) q) per token: logits (..., V) -> (...); 0 <= skew < 1."""
    log_p, log_q = log_probabilities(teacher.detach(), temperature), log_probabilities(student, temperature)
    p = log_p.exp()
    return expected(p, log_p) - expected(p, log_mixture(log_p, log_q, skew))


def skewed_reverse_kl(student: Tensor, teacher: Tensor, skew: float = 0.1, temperature: float = 1.0) -> Tensor:
    """KL(q || (1 - skew) p + skew q) per token: logits (..., V) -> (...); 0 <= skew < 1."""
    log_p, log_q = log_probabilities(teacher.detach(), temperature), log_probabilities(student, temperature)
    return (log_q.exp() * (log_q - log_mixture(log_q, log_p, skew))).sum(-1)


def log_mixture(first: Tensor, second: Tensor, weight: float) -> Tensor:
    """log(weight exp(first) + (1 - weight) exp(second)) elementwise; 0 <= weight <= 1."""
    if weight in (0, 1):
        return first if weight == 1 else second
    return torch.logaddexp(first + math.log(weight), second + math.log1p(-weight))


def share_of_own(share: float, before: float, now: float, step: float = 0.1, tolerance: float = 0.0) -> float:
    """The share of batches of the student's own sequences after an evaluation; never falls, at most 1."""
    return min(1.0, share + step) if now > before + tolerance else share
