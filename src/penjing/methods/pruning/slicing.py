"""SliceGPT with one rotation for the whole residual stream: turn it so that the last channels matter least, cut them.

An RMSNorm does not see a rotation of its input, so with norms folded into the linears after them the stream may be
written in any orthonormal basis Q. Take the principal axes of what the norms pass on,

    C = sum over norms and tokens of x^T x / (|x|^2 / D)        C = Q diag(lambda) Q^T, lambda descending,

and keep the first d channels of x Q. The paper takes a rotation per block and a matrix Q_l^T Q_(l+1) on each residual
connection, which no stock architecture has; one rotation for all gives up some quality, and the result is a plain
checkpoint that every engine loads. Tokens are divided by their norm because that is what the linears see of them:
otherwise the few tokens with huge activations would decide alone.

Worked example: x = [1, 1] or [2, 2] for all tokens: C is 2 [[1, 1], [1, 1]], Q = [[1, 1], [1, -1]] / sqrt(2), and one
channel holds everything.

Source: Ashkboos et al. 2024, "SliceGPT: Compress Large Language Models by Deleting Rows and Columns"
(arXiv:2401.15024), sections 3.2-3.4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.errors import CalibrationError
from penjing.numerics.finite import all_finite
from penjing.numerics.hadamard import Rotation


def normalised_covariance(states: Tensor) -> Tensor:
    """Sum over tokens of the outer products of states of mean square one: (..., D) -> fp64 (D, D)."""
    tokens = states.reshape(-1, states.shape[-1]).double()
    scale = tokens.square().mean(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny).rsqrt()
    unit = tokens * scale
    return unit.T @ unit


def principal_axes(covariance: Tensor) -> Rotation:
    """The rotation x -> x Q onto the eigenvectors of `covariance` (D, D), largest eigenvalue first.

    Each eigenvector's largest entry is positive, so that equal input gives equal signs. Raises CalibrationError when
    the matrix is not finite.
    """
    if not all_finite(covariance):
        raise CalibrationError("the covariance of the residual stream is not finite: activations overflowed; use fp32")
    _, vectors = torch.linalg.eigh(covariance.double())
    vectors = vectors.flip(1)
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return Rotation(torch.ones(len(covariance), dtype=torch.float64), ((vectors * largest.sign()).contiguous(),))
