"""ALPS: choose the mask and the weights together, by splitting the problem in two (ADMM), then solve for the weights.

Minimise ||(W - B) X||^2 over B with a given number of weights that are not zero. With inputs scaled to norm 1 each,
H = D^-1 X X^T D^-1 and W D in place of W, B is held in two copies that are pulled together by a force rho:

    B    = (W H - V + rho S) (H + rho I)^-1         close to the outputs, any number of weights
    S    = the largest magnitudes of B + V / rho    sparse
    V    = V + rho (B - S)                          what keeps them apart, remembered

H is factorised once (eigenvectors), so that a round takes two products of the matrix with a (K, K) matrix. The force
grows while the support still changes; when it stays, B and S agree, and the weights on the support are refitted by
conjugate gradients (`penjing.numerics.refit`).

Worked example. W = [[1, 3]], H = [[2, 1], [1, 1]] undamped, half removed: [0, 4], loss 1. Masking without refitting,
[0, 3], has loss 2, and [2.5, 0] the loss 4.5.

Source: Meng, Behdin, Wang, Mazumder 2024, "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for Large
Language Models" (arXiv:2406.07831), algorithm 1 and section 3.2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import Field
from torch import Tensor

from penjing.methods.base import LinearInput
from penjing.methods.pruning.options import SparsityOptions, check_pattern_fits
from penjing.methods.results import pruned
from penjing.numerics.cholesky import dead_columns
from penjing.numerics.masks import dropped_of, keep_largest, keep_pattern
from penjing.numerics.refit import damped, refit
from penjing.representations import Masked
from penjing.statistics import Gram

EVERY = 3
"""Rounds after which the force is looked at."""

FORCE, FASTER = 0.1, ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""The force at first, and by how much it grows when more than a share of the support has changed."""


class ALPSOptions(SparsityOptions):
    """Recipe keys of ALPS."""

    damping: float = Field(0.01, ge=0, description="added to the Hessian's diagonal, relative to its mean")
    rounds: int = Field(60, ge=1, description="of ADMM at most; it ends when the support stays the same")


@dataclass(frozen=True)
class _Budget:
    """How many weights stay, and among which they compete."""

    sparsity: float
    pattern: str | None
    kept: Tensor | None

    def mask(self, scores: Tensor) -> Tensor:
        """The support for these scores (N, K)."""
        if self.pattern is not None:
            return keep_pattern(scores, *check_pattern_fits(self.pattern, scores.shape[1]), self.kept)
        still = None if self.kept is None else self.kept.reshape(1, -1)
        drop = dropped_of(scores.numel(), self.sparsity)
        return keep_largest(scores.reshape(1, -1), drop, still).reshape(scores.shape)


def alps(
    weight: Tensor,
    gram: Tensor,
    sparsity: float | None = None,
    *,
    pattern: str | None = None,
    damping: float = 0.01,
    rounds: int = 60,
    kept: Tensor | None = None,
    storage_dtype: torch.dtype = torch.bfloat16,
) -> Masked:
    """Prune `weight` (N, K) given `gram` (K, K), the sum of outer products of its inputs.

    Removes exactly the fraction `sparsity` (rounded down) of the matrix, or N of every M inputs (`pattern`). Weights
    outside `kept` are gone already; they count towards the sparsity and stay gone.
    """
    budget = _Budget(sparsity or 0, pattern, kept)
    weight = weight.float().masked_fill(dead_columns(gram), 0)
    hessian = damped(gram, damping)
    norms = hessian.diagonal().sqrt()
    support = _admm(weight * norms, hessian / norms / norms.unsqueeze(1), budget, rounds)
    return pruned(refit(weight, gram, support, damping=damping), support, storage_dtype)


def _admm(weight: Tensor, hessian: Tensor, budget: _Budget, rounds: int) -> Tensor:
    """The support, bool (N, K)."""
    values, vectors = torch.linalg.eigh(hessian)
    values = values.clamp(min=0)
    goal = weight @ hessian
    support = budget.mask(weight.abs())
    sparse, dual, before, force = weight * support, torch.zeros_like(weight), support, FORCE
    for number in range(1, rounds + 1):
        free = ((goal - dual + force * sparse) @ vectors / (values + force)) @ vectors.T
        pulled = free + dual / force
        support = budget.mask(pulled.abs())
        sparse = pulled * support
        dual = dual + force * (free - sparse)
        if number % EVERY == 0:
            changed = float((support != before).sum() / support.sum().clamp(min=1))
            if changed == 0 and number > 2 * EVERY:
                break
            force *= next((factor for share, factor in FASTER if changed > share), FASTER[-1][1])
            before = support
    return support


def linear(given: LinearInput, options: ALPSOptions) -> Masked:
    """Prune one linear, or with a pattern the stacked rows of several that share their inputs."""
    return alps(
        given.weight,
        given.statistics[Gram].value,
        options.sparsity,
        pattern=options.pattern,
        damping=options.damping,
        rounds=options.rounds,
        kept=given.kept,
        storage_dtype=given.storage_dtype,
    )
