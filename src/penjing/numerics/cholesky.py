"""The triangular factor of a damped inverse Hessian, as GPTQ and SparseGPT need it, for any Gram matrix.

For H = G + d * mean(diag G) * I both methods use the upper factor U with

    H^-1 = U^T U,        U[i, i]**2 = [(H[i:, i:])^-1]_00,

because row i of U says how the columns after i should move when column i is fixed. U comes from one Cholesky
factorisation of H read backwards: with J the reversal of rows and columns and J H J = L L^T, it is U = J L^-1 J.
That never forms H^-1, so it is both cheaper and better conditioned than inverting first.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from penjing.errors import CalibrationError
from penjing.numerics.finite import all_finite

STRONGEST_DAMPING = 1e3
"""Past this multiple of the mean diagonal the factor is the identity for every practical purpose."""

_SMALL = 512
"""Rows of a triangular matrix that is inverted by solving for the identity."""


class DampingWarning(UserWarning):
    """The statistics were too thin for the damping asked for; the message says what was used instead."""


def dead_columns(gram: Tensor) -> Tensor:
    """Inputs that were never active: bool (K,) from a Gram matrix (K, K).

    All False for a matrix of zeros: then nothing is known about any input, rather than that all are useless.
    """
    diagonal = gram.diagonal()
    return (diagonal == 0) & (diagonal != 0).any()


def inverse_factor(gram: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper factor U (K, K) of the inverse of the damped `gram` (K, K), and the damping that was needed.

    `damping` is relative to the mean diagonal of the live columns. When the factorisation fails, it is raised
    tenfold until it succeeds, with a `DampingWarning`. Dead columns get the mean diagonal, which decouples them. A
    matrix of zeros gives the identity (rounding without compensation), with a warning.

    Raises CalibrationError when the matrix is not finite.
    """
    if not all_finite(gram):
        raise CalibrationError("the Gram matrix of a linear's inputs is not finite: activations overflowed; use fp32")
    diagonal = gram.diagonal()
    live = diagonal != 0
    if not live.any():
        _warn("no calibration token reached this linear: weights are rounded to nearest, without compensation")
        return torch.eye(len(gram), dtype=gram.dtype, device=gram.device), damping
    mean = diagonal[live].mean()
    used = damping
    while used <= STRONGEST_DAMPING:
        backwards = gram.flip(0, 1).div_(mean)
        backwards.diagonal().add_(used).add_((~live).flip(0))
        factor = _reversed_inverse(backwards)
        if factor is not None:
            if used != damping:
                _warn(f"damping raised from {damping:g} to {used:g} of the mean diagonal to factorise the Gram matrix")
            return factor.div_(mean.sqrt()), used
        used = max(used * 10, 1e-4)
    _warn("the Gram matrix is not positive semi-definite: weights are rounded to nearest, without compensation")
    return torch.eye(len(gram), dtype=gram.dtype, device=gram.device), used


def damped(gram: Tensor, damping: float) -> Tensor:
    """The matrix (K, K) of whose inverse `inverse_factor` with the same `damping` gives the factor."""
    live = gram.diagonal() != 0
    mean = gram.diagonal()[live].mean() if live.any() else torch.ones(())
    result = gram.clone()
    result.diagonal().add_(mean * (damping + (~live).float()))
    return result


def _reversed_inverse(backwards: Tensor) -> Tensor | None:
    """J L^-1 J for `backwards` = L L^T; None when it is not positive definite in this precision."""
    lower, failed = torch.linalg.cholesky_ex(backwards)
    if failed:
        return None
    _invert(lower)
    return lower.flip(0, 1) if all_finite(lower) else None


def _invert(lower: Tensor) -> None:
    """Replace a lower triangular matrix (n, n) by its inverse: of the halves first, then

        [A 0]^-1   [ A^-1            0   ]
        [C B]    = [-B^-1 C A^-1   B^-1 ]

    in n^3 / 3 multiplications and additions, a third of what solving for the identity takes.
    """
    if len(lower) <= _SMALL:
        identity = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
        lower.copy_(torch.linalg.solve_triangular(lower, identity, upper=False))
        return
    half = len(lower) // 2
    first, below, second = lower[:half, :half], lower[half:, :half], lower[half:, half:]
    solved = torch.linalg.solve_triangular(first, below, upper=False, left=False)
    below.copy_(torch.linalg.solve_triangular(second, solved, upper=False).neg_())
    _invert(first)
    _invert(second)


def _warn(message: str) -> None:
    warnings.warn(message, DampingWarning, stacklevel=3)
