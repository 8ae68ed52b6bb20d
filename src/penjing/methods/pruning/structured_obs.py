"""Structured optimal brain surgeon: remove the unit whose loss is least once all others have made up for it; repeat.

With H = X X^T of the inputs of the linear W that reads the units, and B the columns of a unit,

    loss_B = tr(W_B ([H^-1]_BB)^-1 W_B^T)
    W     -= W_B ([H^-1]_BB)^-1 [H^-1]_B:         H^-1 -= [H^-1]_:B ([H^-1]_BB)^-1 [H^-1]_B:

so that every choice sees what the earlier ones left. The weights that stay come from one refit at the end, which gives
the same numbers without the rounding of many updates.

Worked example: W = [[1, 1, 1]], H = [[1, .9, 0], [.9, 1, 0], [0, 0, 1]]. H^-1 has diagonal [5.26, 5.26, 1], losses are
[.19, .19, 1]: the first goes, as the second can do its work, and then the two left cost 3.61 and 1: the third goes.

Source: Kurtic et al. 2023, "ZipLM: Inference-Aware Structured Pruning of Language Models" (arXiv:2302.04089), eq. 2-3.
"""

from __future__ import annotations

import torch
from torch import Tensor

REFRESH = 256
"""Removals after which the inverse is formed anew: each update loses a little precision."""


def structured_obs(columns: Tensor, gram: Tensor, drop: int, *, damping: float = 1e-2) -> Tensor:
    """Scores fp64 (U,) from columns (U, N, S) and gram (K, K): the `drop` units removed get their turn minus `drop`.

    So they are negative, the first the lowest; the others get the loss of being next. Damping is relative to the mean
    of the diagonal; units that are never active cost nothing and go first.
    """
    count, outputs, size = columns.shape
    weight = columns.double().permute(1, 0, 2).clone()  # (N, U, S)
    hessian = gram.double().clone()
    hessian.diagonal().add_(damping * hessian.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny))
    alive = torch.ones(count, dtype=torch.bool)
    scores = torch.zeros(count, dtype=torch.float64)
    inverse = torch.linalg.inv(hessian)
    for turn in range(drop):
        if turn and turn % REFRESH == 0:
            inverse = _inverse_of(hessian, alive.repeat_interleave(size))
        unit = int(_losses(weight, inverse, alive).argmin())
        scores[unit], alive[unit] = turn - drop, False
        block = slice(unit * size, (unit + 1) * size)
        gain = torch.linalg.solve(inverse[block, block], inverse[block])
        weight -= (weight[:, unit] @ gain).view(outputs, count, size)
        inverse = inverse - inverse[:, block] @ gain
        weight[:, unit] = 0
    scores[alive] = _losses(weight, inverse, alive)[alive]
    return scores


def _losses(weight: Tensor, inverse: Tensor, alive: Tensor) -> Tensor:
    """Loss of removing each unit next, infinite for those that are gone: (U,)."""
    _, count, size = weight.shape
    blocks = inverse.view(count, size, count, size).diagonal(dim1=0, dim2=2).permute(2, 0, 1).clone()
    blocks[~alive] = torch.eye(size, dtype=blocks.dtype)
    if size == 1:
        losses = weight.square().sum((0, 2)) / blocks.flatten()
    else:
        losses = torch.einsum("nus,uts,nut->u", weight, torch.linalg.inv(blocks), weight)
    return losses.masked_fill(~alive, torch.inf)


def _inverse_of(hessian: Tensor, alive: Tensor) -> Tensor:
    """Inverse of the part of the Hessian that is left, zero elsewhere."""
    inverse = torch.zeros_like(hessian)
    left = alive.nonzero().flatten()
    inverse[left.unsqueeze(1), left] = torch.linalg.inv(hessian[left][:, left])
    return inverse
