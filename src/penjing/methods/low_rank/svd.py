"""Truncated singular value decomposition: the closest matrix of rank r. The baseline of all others; no calibration.

    W = U S V^T        W_r = (U_r S_r^1/2) (S_r^1/2 V_r^T)

Of all matrices of rank r it has the least |W - W_r|, with |W - W_r|^2 = sum of the squares of the singular values left
out (Eckart, Young 1936). The root of S goes to both factors: their entries are of like size, and either can be rounded.

Worked example, r = 1: W = [[3, 0], [4, 5]]. W W^T = [[9, 12], [12, 41]] has eigenvalues 45 and 5, so S = (6.708,
2.236);

    u = [1, 3] / sqrt(10)      W_1 = u u^T W = [[1.5, 1.5], [4.5, 4.5]]      |W - W_1|^2 = 5

Source: Eckart, Young 1936, "The approximation of one matrix by another of lower rank"; as a compression of language
models the baseline of arXiv:2312.05821 and arXiv:2403.07378.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.methods.base import LinearInput
from penjing.methods.low_rank.options import RankOptions, product
from penjing.representations import LowRank


def truncated(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Balanced factors (N, r), (r, K) in fp64 of the closest matrix of rank `rank` to `weight` (N, K)."""
    u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
    root = s[:rank].sqrt()
    return u[:, :rank] * root, root.unsqueeze(1) * vt[:rank]


def svd(weight: Tensor, rank: int, storage_dtype: torch.dtype = torch.bfloat16) -> LowRank:
    """`weight` (N, K) as the closest product of (N, rank) and (rank, K)."""
    return product(*truncated(weight, rank), storage_dtype)


def linear(given: LinearInput, options: RankOptions) -> LowRank:
    """Factor one linear."""
    return svd(given.weight, options.rank_of(given.weight.shape), given.storage_dtype)
