"""What was lost, measured on logits: perplexity, KL divergence from the dense model, agreement on the next token.

Logits arrive in chunks and are worked on a few rows at a time, so no more than a few copies of some 32 MB exist at
once whatever the vocabulary. Softmaxes are fp32, sums are fp64.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from penjing.errors import CalibrationError
from penjing.numerics.finite import all_finite

_ELEMENTS = 2**23  # logits worked on at once


@dataclass(frozen=True)
class Quality:
    """A measured model. Numbers that need the dense model beside it are None without one.

    tokens                predictions scored
    perplexity            exp(mean negative log-likelihood); infinite when that exceeds what fp64 can say
    nll                   mean negative log-likelihood, nats per token
    kl                    mean KL(dense || compressed), nats per token
    kl_error              standard error of that mean, tokens taken as independent
    top1                  share of tokens where both models rank the same token first
    reference_perplexity  the dense model's, on the same tokens
    reference_nll         the dense model's
    """

    tokens: int
    perplexity: float | None
    nll: float
    kl: float | None = None
    kl_error: float | None = None
    top1: float | None = None
    reference_perplexity: float | None = None
    reference_nll: float | None = None


class Comparison:
    """Accumulates a model's logits, with or without the dense model's for the same tokens.

        comparison = Comparison()
        for window in windows:                      # (L,)
            logits = model(window)                  # (L, V)
            comparison.update(logits[:-1], window[1:], dense_logits[:-1])
        comparison.result().perplexity

    Perplexity is exp of the mean over all `L - 1` predictions of every window. KL is summed as
    `p (log p - log q) + q - p`, whose terms are all >= 0 and whose sum is the KL divergence of normalised `p` and
    `q`: a rounding error in a normaliser enters squared, so small divergences stay accurate (to some 1e-8) and
    equal logits give exactly 0.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._nll = 0.0
        self._reference_nll = 0.0
        self._kl = 0.0
        self._kl_squares = 0.0
        self._agreed = 0
        self._with_reference: bool | None = None

    def update(self, logits: Tensor, targets: Tensor, reference_logits: Tensor | None = None) -> None:
        """Take in T predictions: `logits` (T, V) of any float type, `targets` (T,) token ids, the dense model's logits.

        Raises CalibrationError when logits are not finite, ValueError when shapes do not fit, or when only some
        updates have reference logits.
        """
        self._check(logits, targets, reference_logits)
        rows = max(1, _ELEMENTS // logits.shape[1])
        for start in range(0, len(targets), rows):
            chunk = slice(start, start + rows)
            reference = None if reference_logits is None else reference_logits[chunk]
            self._add(logits[chunk], targets[chunk], reference)
        self.tokens += len(targets)

    def _check(self, logits: Tensor, targets: Tensor, reference: Tensor | None) -> None:
        if logits.ndim != 2 or targets.shape != logits.shape[:1]:
            raise ValueError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)} must be (T, V) and (T,)")
        if reference is not None and reference.shape != logits.shape:
            raise ValueError(f"logits {tuple(logits.shape)} and reference {tuple(reference.shape)} must be alike")
        given = reference is not None
        if self._with_reference not in (None, given):
            raise ValueError("either every update has reference logits or none has")
        self._with_reference = given

    def _add(self, logits: Tensor, targets: Tensor, reference: Tensor | None) -> None:
        log_q = _log_softmax(logits, "the model's")
        self._nll -= _sum(log_q.gather(1, targets.unsqueeze(1)))
        if reference is None:
            return
        log_p = _log_softmax(reference, "the dense model's")
        self._reference_nll -= _sum(log_p.gather(1, targets.unsqueeze(1)))
        self._agreed += int((log_p.argmax(1) == log_q.argmax(1)).sum())
        p = log_p.exp()
        divergence = (log_p - log_q).mul_(p).add_(log_q.exp_()).sub_(p).sum(1, dtype=torch.float64).clamp_(min=0)
        self._kl += _sum(divergence)
        self._kl_squares += _sum(divergence.square())

    def result(self) -> Quality:
        """The numbers so far. Raises CalibrationError when nothing was scored."""
        if not self.tokens:
            raise CalibrationError("no token was scored: the evaluation has no window of two tokens or more")
        nll = self._nll / self.tokens
        if not self._with_reference:
            return Quality(self.tokens, _exp(nll), nll)
        reference_nll, kl = self._reference_nll / self.tokens, self._kl / self.tokens
        variance = max(self._kl_squares / self.tokens - kl * kl, 0.0) / max(self.tokens - 1, 1)
        return Quality(
            tokens=self.tokens,
            perplexity=_exp(nll),
            nll=nll,
            kl=kl,
            kl_error=math.sqrt(variance),
            top1=self._agreed / self.tokens,
            reference_perplexity=_exp(reference_nll),
            reference_nll=reference_nll,
        )


def token_log_likelihoods(logits: Tensor, rows: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Of `targets` (N,) under `logits` (T, V), each in the row that `rows` (N,) names.

    Log-likelihoods fp32 (N,) in nats, and whether the target is the likeliest token, bool (N,). Raises CalibrationError
    when logits are not finite.
    """
    log_q = _log_softmax(logits, "the model's")
    return log_q[rows, targets], log_q.argmax(1)[rows] == targets


def _log_softmax(logits: Tensor, whose: str) -> Tensor:
    logits = logits.float()
    if not all_finite(logits):
        raise CalibrationError(
            f"{whose} logits hold NaN or infinity: the forward pass overflowed (try dtype float32 or bfloat16) "
            "or a weight is damaged"
        )
    return torch.log_softmax(logits, 1)


def _sum(values: Tensor) -> float:
    return float(values.sum(dtype=torch.float64))


def _exp(nll: float) -> float:
    return math.exp(nll) if nll < 700 else math.inf
