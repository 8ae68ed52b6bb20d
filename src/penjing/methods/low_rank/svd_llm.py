"""SVD-LLM in closed form: outputs are projected onto the directions in which they vary most.

    minimise  |(W - W_r) X|^2 = tr (W - W_r) G (W - W_r)^T        G = X X^T

The published way whitens the inputs with a Cholesky factor, G = S S^T, truncates W S = U Sigma V^T and multiplies by
the inverse of S. But (W S)(W S)^T = W G W^T, so U are the eigenvectors of W G W^T, and the result is

    W_r = U_r U_r^T W        loss = sum of the eigenvalues left out

without factor or inverse, which is why a singular G (fewer tokens than inputs, dead inputs) does no harm. `left` =
U_r is orthonormal and `right` = U_r^T W a mixture of rows of W, so both can be rounded like weights. Of the two
products, N x N and K x K, the smaller is decomposed: where K < N, with G = Q L Q^T and B = W Q L^1/2, the right
singular vectors of B give the same U. A billionth of its mean is added to G's diagonal, so that among directions
never seen W itself decides.

Worked example, r = 1: W = [[3, 0], [4, 5]], G = diag(0, 1): W G W^T = [[0, 0], [0, 25]], u = [0, 1],

    W_1 = [[0, 0], [4, 5]]        loss 0: the first input is always zero, so the first output is

Source: Wang et al. 2024, "SVD-LLM: Truncation-aware Singular Value Decomposition for Large Language Model Compression"
(arXiv:2403.07378), section 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.methods.base import LinearInput
from penjing.methods.low_rank.options import RankOptions, product
from penjing.representations import LowRank
from penjing.statistics import Gram

_LEAST = 1e-9


def output_basis(weight: Tensor, gram: Tensor, rank: int) -> Tensor:
    """U_r, orthonormal (N, rank) in fp64: the directions in which outputs of `weight` (N, K) vary most.

    gram  (K, K), the sum of x x^T over the inputs; may be singular
    """
    weight, gram = weight.double(), gram.double().clone()
    gram.diagonal().add_(_LEAST * gram.diagonal().mean() or _LEAST)
    rows, columns = weight.shape
    if rows <= columns:
        return torch.linalg.eigh(weight @ gram @ weight.T).eigenvectors[:, -rank:].flip(1)
    values, vectors = torch.linalg.eigh(gram)
    scaled = weight @ (vectors * values.clamp(min=0).sqrt())
    top = torch.linalg.eigh(scaled.T @ scaled).eigenvectors[:, -rank:].flip(1)
    return torch.linalg.qr(scaled @ top).Q


def svd_llm(weight: Tensor, gram: Tensor, rank: int, storage_dtype: torch.dtype = torch.bfloat16) -> LowRank:
    """`weight` (N, K) as the product of (N, rank) and (rank, K) whose outputs are closest, given `gram` (K, K)."""
    basis = output_basis(weight, gram, rank)
    return product(basis, basis.T @ weight.double(), storage_dtype)


def linear(given: LinearInput, options: RankOptions) -> LowRank:
    """Factor one linear."""
    return svd_llm(given.weight, given.statistics[Gram].value, options.rank_of(given.weight.shape), given.storage_dtype)
