"""Wanda: remove weights that are small and see small inputs; no weight is updated, unless `refit` asks for it.

    score_ij = |W_ij| ||x_j||_2

with the norm of input j over all calibration tokens. Scores compete within one output (row), which matters: every
output loses the same share. With inputs of equal norm it is magnitude pruning by row.

Worked example, half of each row removed: W = [[4, -1], [1, 2]], ||x|| = [1, 8]

    scores = [[4, 8], [1, 16]]      W_hat = [[0, -1], [0, 2]]      (magnitude would keep the 4)

Source: Sun, Liu, Bair, Kolter 2024, "A Simple and Effective Pruning Approach for Large Language Models"
(arXiv:2306.11695), eq. 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.methods.base import LinearInput
from penjing.methods.pruning.options import RefitOptions, check_pattern_fits
from penjing.methods.results import pruned
from penjing.numerics.masks import dropped_of, keep_largest, keep_pattern
from penjing.representations import Masked
from penjing.statistics import ColumnNorm


def wanda(
    weight: Tensor,
    squares: Tensor,
    sparsity: float | None = None,
    *,
    pattern: str | None = None,
    kept: Tensor | None = None,
    storage_dtype: torch.dtype = torch.bfloat16,
) -> Masked:
    """Remove a fraction `sparsity` of every row of `weight` (N, K), or N of every M inputs (`pattern`).

    `squares` (K,) is the sum over tokens of x_j^2. Weights outside `kept` are gone already; they count towards the
    sparsity and stay gone.
    """
    scores = weight.float().abs() * squares.float().sqrt()
    columns = weight.shape[1]
    if pattern is not None:
        mask = keep_pattern(scores, *check_pattern_fits(pattern, columns), kept)
    else:
        mask = keep_largest(scores, dropped_of(columns, sparsity or 0), kept)
    return pruned(weight, mask, storage_dtype)


def linear(given: LinearInput, options: RefitOptions) -> Masked:
    """Prune one linear, or the stacked rows of several that share their inputs."""
    found = wanda(
        given.weight,
        given.statistics[ColumnNorm].value,
        options.sparsity,
        pattern=options.pattern,
        kept=given.kept,
        storage_dtype=given.storage_dtype,
    )
    return options.finish(given, found.kept)
