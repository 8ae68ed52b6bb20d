"""Refit of a linear that lost inputs: the kept columns take over what the removed ones did, in closed form.

With G = X X^T of all inputs, K the kept and R the removed ones, the weight that minimises

    ||W X - W' X_K||^2 + lambda ||W' - W_K||^2        is        W' = W_K + W_R G_RK (G_KK + lambda I)^-1.

As lambda goes to zero it is W G_:K G_KK^-1, least squares; the ridge draws towards the weights that were there rather
than towards zero, so inputs that were never active keep theirs. It is relative to the mean of the diagonal of G_KK.
Removing columns one by one with the optimal brain surgeon's updates ends at the same weights.

Where the linear has a bias, means are left to it: G is then the covariance and b' = b + W m - W' m_K, which can only
be better.

Worked example: W = [[1, 1]], inputs x2 = 2 x1 always; keeping the first: W' = [[1 + 1 * 2]] = [[3]], the same function.

Source: least squares; as structured OBS in Kurtic et al. 2023, "ZipLM" (arXiv:2302.04089), eq. 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.errors import CalibrationError
from penjing.numerics.finite import all_finite


def refit(weight: Tensor, gram: Tensor, kept: Tensor, *, ridge: float = 1e-4) -> Tensor:
    """The kept columns after the refit, fp32 (N, k): weight (N, K), gram (K, K), indices (k,). Solved in fp64.

    Raises CalibrationError when the Gram matrix is not finite.
    """
    if not all_finite(gram):
        raise CalibrationError("the Gram matrix of a linear's inputs is not finite: activations overflowed; use fp32")
    gone = torch.ones(len(gram), dtype=torch.bool)
    gone[kept] = False
    inner = gram[kept][:, kept].double()
    strength = ridge * inner.diagonal().mean()
    if not strength > 0:
        return weight[:, kept].float()
    inner.diagonal().add_(strength)
    pulled = weight[:, gone].double() @ gram[gone][:, kept].double()
    update = torch.linalg.solve(inner, pulled.T).T
    return (weight[:, kept].double() + update).float()


def refit_with_bias(
    weight: Tensor, bias: Tensor, gram: Tensor, mean: Tensor, tokens: int, kept: Tensor, *, ridge: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """Weight (N, k) and bias (N,), fp32, of a linear that has a bias; `mean` (K,) of the inputs over `tokens`."""
    mean = mean.double()
    covariance = gram.double() - tokens * torch.outer(mean, mean)
    new = refit(weight, covariance, kept, ridge=ridge)
    moved = weight.double() @ mean - new.double() @ mean[kept]
    return new, (bias.double() + moved).float()
