"""MiniLLM: reverse KL over whole sequences, by policy gradient.

The student q writes y_1..y_T; r_t = log p(y_t) - log q(y_t) is how much more the teacher p likes what it wrote. The
gradient of KL(q || p) = -E_q sum_t r_t falls into a part that is known exactly at every prefix and a part that says
what a token does to those after it:

    single step   sum_t  w_t  grad KL(q(. | y_<t) || p(. | y_<t))
    long          - sum_t  w_t  R_t  grad log q(y_t | y_<t)           R_t = sum_{t' > t} r_t'

Three measures keep the variance down and students honest:

    teacher-mixed sampling   y ~ a p + (1 - a) q, a = 0.2; weights w_t = q(y_t) / (a p(y_t) + (1 - a) q(y_t)), the
                             ratio of one step instead of the product of all before
    length normalisation     R_t / (T - t), or the student learns to write little; 0 at the last token
    language model           the loss on ordinary text is added, weighted, so that the student stays a language model

With a = 0, without normalisation and over all sequences, the estimate is the gradient of KL(q || p): a test adds up a
toy vocabulary. Rewards, weights and returns are constants; nothing is differentiated through sampling. Only tokens the
model wrote count, the end-of-text token among them, padding and prompt not.

The authors' code differs from their paper (rewards of the step itself count, whitening over a batch with padding,
clipped ratios over four updates of one sample); this is the paper's, one update per sample.

Source: Gu et al. 2024, "MiniLLM" (arXiv:2306.08543), eq. 3-8 and algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.methods.distillation.skewed_kl import log_mixture
from penjing.methods.distillation.tokens import log_probabilities


def mixed_sampling(student: Tensor, teacher: Tensor, teacher_share: float = 0.2) -> Tensor:
    """Probabilities (..., V) that the next token is drawn from: logits of both (..., V)."""
    return log_mixture(log_probabilities(teacher), log_probabilities(student), teacher_share).exp()


def rewards(student: Tensor, teacher: Tensor, written: Tensor) -> Tensor:
    """r_t = log p(y_t) - log q(y_t), without gradient; log-probabilities of the tokens (B, T), bool mask (B, T)."""
    return torch.where(written, teacher - student, 0).detach()


def returns(reward: Tensor, written: Tensor, normalise: bool = True) -> Tensor:
    """R_t: the rewards after t, (B, T) -> (B, T); `normalise` divides by how many there are. 0 where none follow."""
    reward = torch.where(written, reward, 0)
    after = _after(reward)
    if not normalise:
        return after
    return after / _after(written.to(reward.dtype)).clamp(min=1)


def _after(values: Tensor) -> Tensor:
    """Sum of what follows each position of (B, T)."""
    return values.flip(1).cumsum(1).flip(1) - values


def importance(student: Tensor, teacher: Tensor, teacher_share: float) -> Tensor:
    """w_t from log-probabilities of the tokens (B, T), without gradient; 1 when the student alone sampled."""
    if teacher_share == 0:
        return torch.ones_like(student)
    return (student - log_mixture(teacher, student, teacher_share)).exp().detach()


def minillm(
    student: Tensor,
    teacher: Tensor,
    tokens: Tensor,
    written: Tensor,
    *,
    teacher_share: float = 0.2,
    normalise: bool = True,
) -> Tensor:
    """The loss whose gradient is the estimate above, mean over the sequences.

    student, teacher  logits (B, T, V) at the positions that predict `tokens`
    tokens            int64 (B, T), what was drawn
    written           bool (B, T), false for prompt and padding

    Its value is no distance: only the gradient means something. Watch `sequence_reverse_kl`.
    """
    with torch.no_grad():
        log_q, log_p = (
            log_probabilities(logits).gather(-1, tokens[..., None]).squeeze(-1) for logits in (student, teacher)
        )
        weight = importance(log_q, log_p, teacher_share)
        advantage = returns(rewards(log_q, log_p, written), written, normalise)
    losses = token_losses(student, teacher, tokens, weight, advantage)
    return torch.where(written, losses, 0).sum() / len(tokens)


def token_losses(student: Tensor, teacher: Tensor, tokens: Tensor, weight: Tensor, advantage: Tensor) -> Tensor:
    """w_t (KL(q || p) - R_t log q(y_t)) per token: logits (..., V); tokens, w and R (...), constants."""
    log_q, log_p = log_probabilities(student), log_probabilities(teacher.detach())
    single = (log_q.exp() * (log_q - log_p)).sum(-1)
    return weight * (single - advantage * log_q.gather(-1, tokens[..., None]).squeeze(-1))


def sequence_reverse_kl(student: Tensor, teacher: Tensor, written: Tensor) -> Tensor:
    """Estimate of KL(q || p) per sequence from sequences that the student wrote: sum_t (log q - log p), mean over
    sequences; log-probabilities of the tokens (B, T)."""
    return -rewards(student, teacher, written).sum() / len(written)
