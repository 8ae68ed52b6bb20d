"""PCA of the inputs: a weight reads only the directions in which its inputs vary most.

    G = X X^T = V L V^T        W_r = (W V_r) V_r^T        loss = sum over the directions left out of L_k |W v_k|^2

V_r comes from the inputs alone, so all linears that read the same input (query, key, value; gate, up) get the same
right factor: it is the joint basis of all of them, and the best one for inputs as such. For each linear's own outputs
it is never better than SVD-LLM, which is PCA of the outputs and looks at W, too. Means are not subtracted: a bias
that made up for them would be a new tensor.

Worked example, r = 1: W = [[3, 0], [4, 5]], G = diag(1, 9): V_1 = [0, 1], W_1 = [[0, 0], [0, 5]], and the loss is
1 * |[3, 4]|^2 = 25.

Source: Pearson 1901, on systems of points in space; for transformers Ashkboos et al. 2024, SliceGPT (arXiv:2401.15024),
whose rotation of the residual stream is this basis.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.methods.base import LinearInput
from penjing.methods.low_rank.options import RankOptions, product
from penjing.representations import LowRank
from penjing.statistics import Gram


def pca(weight: Tensor, gram: Tensor, rank: int, storage_dtype: torch.dtype = torch.bfloat16) -> LowRank:
    """`weight` (N, K) as (N, rank) times the top principal directions (rank, K) of its inputs, given `gram` (K, K)."""
    basis = torch.linalg.eigh(gram.double()).eigenvectors[:, -rank:].flip(1)
    return product(weight.double() @ basis, basis.T, storage_dtype)


def linear(given: LinearInput, options: RankOptions) -> LowRank:
    """Factor one linear."""
    return pca(given.weight, given.statistics[Gram].value, options.rank_of(given.weight.shape), given.storage_dtype)
