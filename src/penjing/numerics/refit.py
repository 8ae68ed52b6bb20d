"""The best values of the weights that a mask keeps.

A row w of a matrix is pruned to v, zero outside the mask. Its output changes by (w - v) X, so v should minimise

    (w - v) H (w - v)^T        H = X X^T + damping       =>       (v H)_j = (w H)_j   for every j that is kept

a system of its own for each row, since masks differ. Conjugate gradients solve all rows side by side: a step takes one
product of the matrix with H, about what a pass of GPTQ costs, and the loss falls with every step. After as many steps
as a row keeps weights, the solution is exact up to rounding.

Worked example: H = [[2, 1], [1, 1]], w = [1, 2], only the second is kept: v_2 = (w H)_2 / H_22 = (1 + 2) / 1 = 3, loss
1, where w_2 as it was has the loss 2.

Source: conjugate gradients on a fixed support as in Meng et al. 2024, "ALPS" (arXiv:2406.07831), section 3.2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.numerics.cholesky import dead_columns


def damped(gram: Tensor, damping: float) -> Tensor:
    """`gram` (K, K) with a fraction of its mean live diagonal added; dead inputs get that mean."""
    diagonal = gram.diagonal()
    live = diagonal > 0
    mean = float(diagonal[live].mean()) if live.any() else 1.0
    hessian = gram.float().clone()
    hessian.diagonal().add_(damping * mean).add_((~live) * mean)
    return hessian


def refit(weight: Tensor, gram: Tensor, kept: Tensor, *, damping: float = 0.01, steps: int = 32) -> Tensor:
    """Values (N, K), zero outside `kept`, whose output is closest to that of `weight`.

    weight  (N, K), before pruning
    gram    (K, K), sum of outer products of the inputs
    kept    bool (N, K)
    steps   of conjugate gradients at most; rows stop when their residual is 1e-5 of what it was

    Inputs that were never active keep their weights, as nothing says otherwise.
    """
    hessian = damped(gram, damping)
    scale = hessian.diagonal().reciprocal()
    target = weight.float().masked_fill(dead_columns(gram), 0)
    values = target * kept
    residual = ((target - values) @ hessian) * kept
    direction = residual * scale
    energy = (residual * direction).sum(1, keepdim=True)
    limit = energy * 1e-10
    for _ in range(steps):
        if not (energy > limit).any():
            break
        seen = (direction @ hessian) * kept
        length = _ratio(energy, (direction * seen).sum(1, keepdim=True))
        values = values + length * direction
        residual = residual - length * seen
        scaled = residual * scale
        fresh = (residual * scaled).sum(1, keepdim=True)
        direction = scaled + _ratio(fresh, energy) * direction
        energy = fresh
    return torch.where(dead_columns(gram) & kept, weight.float(), values)


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below.clamp(min=torch.finfo(torch.float32).tiny), 0)
