"""Non-negative matrix factorisation: factors whose parts only add up. For those who want to read them, not for quality.

A matrix with signs has no non-negative factors. Two ways out, both with `rank` columns in all:

    split   W = P - Q with P, Q >= 0, each factored with half the rank:   [A_p, -A_q] [B_p; B_q],   A, B >= 0
    semi    W = A B with B >= 0 and A free

By multiplicative updates (split) and by least squares for A with multiplicative updates for B (semi), where + and - are
the positive and negative parts and products and quotients are entry by entry:

    split   B *= A^T P / (A^T A B)          A *= P B^T / (A B B^T)
    semi    A = W B^T (B B^T)^-1            B *= sqrt((A^T W)+ + (A^T A)- B) / ((A^T W)- + (A^T A)+ B)

No update raises |W - A B|^2. Neither way reaches the SVD at the same rank (Eckart, Young), and `split` spends its
rank twice.

Worked example: W = [[1, 2], [2, 4]] >= 0 is A B with A = [1, 2]^T and B = [1, 2]: `semi` at rank 1 finds it exactly.

Source: Lee, Seung 2001, "Algorithms for Non-negative Matrix Factorization"; Ding, Li, Jordan 2010, "Convex and
Semi-Nonnegative Matrix Factorizations", https://doi.org/10.1109/TPAMI.2008.277.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from penjing.methods.base import LinearInput
from penjing.methods.low_rank.options import RankOptions, product
from penjing.representations import LowRank

_TINY = 1e-12


class NMFOptions(RankOptions):
    """Recipe keys of NMF."""

    form: Literal["semi", "split"] = Field(
        "semi", description="`semi`: only the right factor is non-negative; `split`: both, for W+ and W- apart"
    )
    rounds: int = Field(100, ge=1, description="of updates")


def nmf(weight: Tensor, rank: int, rounds: int = 100) -> tuple[Tensor, Tensor]:
    """Non-negative factors (N, r), (r, K) in fp64 of `weight` (N, K) >= 0."""
    weight = weight.double()
    left, right = _start(weight, rank)
    left = left.clamp(min=_TINY)
    for _ in range(rounds):
        right *= left.T @ weight / (left.T @ left @ right).clamp(min=_TINY)
        left *= weight @ right.T / (left @ (right @ right.T)).clamp(min=_TINY)
    return left, right


def semi_nmf(weight: Tensor, rank: int, rounds: int = 100) -> tuple[Tensor, Tensor]:
    """Factors (N, r) free and (r, K) >= 0 in fp64 of `weight` (N, K)."""
    weight = weight.double()
    _, right = _start(weight, rank)
    for _ in range(rounds):
        left = _least_squares(weight, right)
        seen, square = left.T @ weight, left.T @ left
        above = seen.clamp(min=0) + (-square).clamp(min=0) @ right
        below = (-seen).clamp(min=0) + square.clamp(min=0) @ right
        right *= (above / below.clamp(min=_TINY)).sqrt()
    return _least_squares(weight, right), right


def linear(given: LinearInput, options: NMFOptions) -> LowRank:
    """Factor one linear."""
    rank = options.rank_of(given.weight.shape)
    if options.form == "semi":
        return product(*semi_nmf(given.weight, rank, options.rounds), given.storage_dtype)
    parts = [
        nmf(part.clamp(min=0), share, options.rounds)
        for part, share in ((given.weight, -(-rank // 2)), (-given.weight, rank // 2))
    ]
    (a, b), (c, d) = parts
    return product(torch.cat([a, -c], 1), torch.cat([b, d]), given.storage_dtype)


def _start(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Positive factors from the SVD: of each singular pair the side that weighs more, and a little everywhere."""
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    turned = torch.where(vt.clamp(min=0).square().sum(1) < vt.clamp(max=0).square().sum(1), -1.0, 1.0)
    root = s.sqrt() * turned
    left, right = (u * root).clamp(min=0), (root.unsqueeze(1) * vt).clamp(min=0)
    spare = weight.abs().mean().clamp(min=_TINY).sqrt() * 0.1
    if rank > len(s):  # more columns than the matrix has directions
        left = torch.cat([left, left.new_zeros(len(left), rank - len(s))], 1)
        right = torch.cat([right, right.new_zeros(rank - len(s), right.shape[1])])
    return left + spare, right + spare


def _least_squares(weight: Tensor, right: Tensor) -> Tensor:
    return weight @ torch.linalg.pinv(right, rtol=1e-12)
