"""What quantisation lost, as a change of low rank beside the codes; and codes chosen with that change in view (LoftQ).

    absorbed    B A = the r largest singular triples of W - Q            the best change of rank r, by Eckart and Young
    LoftQ       Q = round(W - B A), B A = the best change for W - Q, in turns; the first turn has B A = 0

Both leave |W - Q - B A| no larger than |W - Q|. B = U sqrt(S), A = sqrt(S) V^T share the scale.

Worked example. W - Q = [[3, 0], [0, 1]], r = 1: B A = [[3, 0], [0, 0]], which leaves an error of 1 instead of sqrt(10).

Source: Li et al. 2023, LoftQ (arXiv:2310.08659), algorithm 1; Yao et al. 2023, ZeroQuant-V2 (arXiv:2303.08302),
section 4 (low-rank compensation).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from penjing.numerics.finite import all_finite


def residual_change(lost: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """B (N, r) and A (r, K) fp32 of the best change of rank r <= `rank` for what was lost (N, K).

    Rows of A and columns of B beyond the matrix's own rank are zero. ValueError for values that are not finite.
    """
    if not all_finite(lost):
        raise ValueError("the difference of the weights is not finite")
    left, values, right = torch.linalg.svd(lost.float(), full_matrices=False)
    up, down = lost.new_zeros(lost.shape[0], rank).float(), lost.new_zeros(rank, lost.shape[1]).float()
    share = values[:rank].sqrt()
    up[:, : len(share)] = left[:, :rank] * share
    down[: len(share)] = share[:, None] * right[:rank]
    return up, down


def loftq(weight: Tensor, quantise: Callable[[Tensor], Tensor], rank: int, turns: int = 5) -> tuple[Tensor, Tensor]:
    """B and A for a weight (N, K) such that `quantise(weight - B A) + B A` is close to it.

    `quantise` rounds to a grid and gives values. The turn with the smallest error counts: a later one may be worse.
    """
    weight = weight.float()
    up, down = residual_change(weight - quantise(weight), rank)
    best = (up, down)
    smallest = torch.linalg.norm(weight - quantise(weight - up @ down) - up @ down)
    for _ in range(turns - 1):
        up, down = residual_change(weight - quantise(weight - up @ down), rank)
        error = torch.linalg.norm(weight - quantise(weight - up @ down) - up @ down)
        if error < smallest:
            best, smallest = (up, down), error
    return best
