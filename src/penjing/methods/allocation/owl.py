"""Sparsity per block or linear with the mean kept: OWL's outlier ratios, and one threshold for all magnitudes.

**OWL** leaves more weights to blocks with many outliers. With A = |W| * ||x|| of all weights of a block,

    D_l = share of A above M times the mean of A        d_l = 2 lambda (D_l - min D) / (max D - min D)
    sparsity_l = S - (d_l - mean d)                     so that blocks lie within 2 lambda of each other

**Global magnitude** is one threshold for the whole model: a linear loses what lies below it.

The mean is over weights, not over blocks, and holds exactly: what a limit takes from one block goes to the others.

Worked example: two blocks of equal size, S = 0.7, lambda = 0.08, D = [3 %, 1 %]: d = [0.16, 0], mean 0.08, sparsities
[0.62, 0.78].

Source: Yin et al. 2024, "Outlier Weighed Layerwise Sparsity (OWL)" (arXiv:2310.05175), eq. 1 and section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

LARGEST = 0.99
"""No block or linear loses more."""

BINS = 1 << 15
"""Magnitudes that bfloat16 tells apart."""


def outlier_ratio(weights: Sequence[Tensor], squares: Sequence[Tensor], *, above: float = 5.0) -> float:
    """Share of the scores |W| ||x|| of several linears that exceed `above` times their mean.

    weights  (N, K) each
    squares  (K,) each, mean over tokens of the squares of the inputs
    """
    scores = [weight.float().abs() * square.float().sqrt() for weight, square in zip(weights, squares, strict=True)]
    count = sum(score.numel() for score in scores)
    mean = sum(float(score.sum(dtype=torch.float64)) for score in scores) / count
    return sum(int((score > above * mean).sum()) for score in scores) / count


def by_outliers(ratios: Sequence[float], sizes: Sequence[int], sparsity: float, *, spread: float = 0.08) -> list[float]:
    """Sparsities of blocks from their outlier ratios: within 2 `spread` of each other, `sparsity` on average.

    sizes  weights of each block
    """
    span = max(ratios) - min(ratios)
    bonus = [2 * spread * (ratio - min(ratios)) / span if span else 0.0 for ratio in ratios]
    return level([sparsity - more for more in bonus], sizes, sparsity)


def level(wanted: Sequence[float], sizes: Sequence[int], mean: float) -> list[float]:
    """`wanted` moved by one number, and held within 0 and `LARGEST`, so that the mean over weights is `mean`."""
    if not 0 <= mean <= LARGEST:
        raise ValueError(f"a mean sparsity of {mean} is not between 0 and {LARGEST}")
    values, share = torch.tensor(wanted, dtype=torch.float64), torch.tensor(sizes, dtype=torch.float64)
    share = share / share.sum()
    low, high = mean - float(values.max()) - 1, mean - float(values.min()) + 1
    for _ in range(200):  # bisection: the mean rises with the shift
        middle = (low + high) / 2
        if float((values + middle).clamp(0, LARGEST) @ share) < mean:
            low = middle
        else:
            high = middle
    return (values + high).clamp(0, LARGEST).tolist()


def magnitude_counts(weight: Tensor) -> Tensor:
    """How many weights have each magnitude in bfloat16, rounded towards zero: int64 (BINS,), by rising magnitude."""
    patterns = weight.float().abs().contiguous().view(torch.int32) >> 16
    return torch.bincount(patterns.flatten(), minlength=BINS)


def by_threshold(counts: Sequence[Tensor], sparsity: float) -> list[float]:
    """Sparsities of linears below the one magnitude that removes a share `sparsity` of all weights.

    counts  `magnitude_counts` of each. Of the weights at the threshold, every linear loses the same share
    """
    total = torch.stack(list(counts)).sum(0)
    goal = sparsity * float(total.sum())
    below = total.cumsum(0)
    place = min(int(torch.searchsorted(below.double(), torch.tensor(goal, dtype=torch.float64))), len(total) - 1)
    missing = (goal - float(below[place] - total[place])) / max(float(total[place]), 1.0)
    wanted = [(float(count[:place].sum()) + missing * float(count[place])) / float(count.sum()) for count in counts]
    return level(wanted, [int(count.sum()) for count in counts], sparsity)
