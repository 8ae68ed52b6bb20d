"""ASVD: a truncated SVD of the weight with its columns scaled by how large their inputs are.

    s_k = mean_t |x_tk| ^ alpha        W diag(s) = U S V^T        W_r = U_r S_r V_r^T diag(1 / s)

A column that sees large inputs counts for more; alpha = 0 is the plain SVD. Inputs are taken to be independent, which
is what SVD-LLM does without. Inputs that were never active count as little as 1e-6.

Worked example, r = 1, alpha = 1: W = [[1, 0], [0, 2]], mean |x| = [4, 1]. The plain SVD keeps the 2. Scaled, W diag(s)
= [[4, 0], [0, 2]], which keeps the 4: W_1 = [[1, 0], [0, 0]], for the output it is 4 x_1 against 2 x_2.

Source: Yuan et al. 2023, "ASVD: Activation-aware Singular Value Decomposition for Compressing Large Language Models"
(arXiv:2312.05821), section 3.2, with the exact decomposition in place of the authors' randomised one.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from penjing.methods.base import LinearInput
from penjing.methods.low_rank.options import RankOptions, product
from penjing.methods.low_rank.svd import truncated
from penjing.representations import LowRank
from penjing.statistics import MeanAbs

_LEAST = 1e-6


class ASVDOptions(RankOptions):
    """Recipe keys of ASVD."""

    alpha: float = Field(0.5, ge=0, le=1, description="power of an input's mean magnitude; 0: the plain SVD")


def asvd(
    weight: Tensor, magnitude: Tensor, rank: int, *, alpha: float = 0.5, storage_dtype: torch.dtype = torch.bfloat16
) -> LowRank:
    """`weight` (N, K) as a product of (N, rank) and (rank, K), given the mean magnitude (K,) of its inputs."""
    scale = magnitude.double().pow(alpha) + _LEAST
    left, right = truncated(weight.double() * scale, rank)
    return product(left, right / scale, storage_dtype)


def linear(given: LinearInput, options: ASVDOptions) -> LowRank:
    """Factor one linear."""
    return asvd(
        given.weight,
        given.statistics[MeanAbs].value,
        options.rank_of(given.weight.shape),
        alpha=options.alpha,
        storage_dtype=given.storage_dtype,
    )
