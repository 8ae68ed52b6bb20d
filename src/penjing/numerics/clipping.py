"""How far to clip a group of weights before its grid is fitted, judged by the group's share of the output."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from penjing.numerics.float_grids import ScaledGrid

ROWS_AT_ONCE = 1024
"""Bounds the working memory of the search; rows do not affect each other."""


def clip_limits(weight: Tensor, inputs: Tensor, grid: ScaledGrid, *, steps: int = 20, furthest: float = 0.5) -> Tensor:
    """Best limit (N, G) on |w| of every group of `weight` (N, K), given some of its `inputs` (T, K).

    Tries the fractions 1, 1 - 1/steps, ... above `1 - furthest` of the group's largest magnitude and takes the one
    with the smallest sum over tokens of (x . (w - w_hat))^2, the larger of equals. Without tokens nothing is clipped.
    """
    width = grid.columns_per_group(weight.shape[1])
    gap = -weight.shape[1] % width
    shape = (grid.groups(weight.shape[1]), width)
    groups = pad(weight.float(), (0, gap)).view(len(weight), *shape)
    tokens = pad(inputs.float(), (0, gap)).view(len(inputs), *shape).transpose(0, 1)
    # sum_t (x_t . d)^2 = d^T (X^T X) d: the smaller of the two factors of each group is kept.
    metric = tokens.mT @ tokens if width <= len(inputs) else tokens.mT
    fractions = [1 - step / steps for step in range(max(int(furthest * steps), 1))]
    return torch.cat([_search(rows, metric, grid, fractions) for rows in groups.split(ROWS_AT_ONCE)])


def _search(groups: Tensor, metric: Tensor, grid: ScaledGrid, fractions: list[float]) -> Tensor:
    largest = groups.abs().amax(-1)
    best, smallest = largest.clone(), torch.full_like(largest, torch.inf)
    for fraction in fractions:
        limit = largest * fraction
        clipped = groups.clamp(-limit.unsqueeze(-1), limit.unsqueeze(-1))
        scale, zero = (part.unsqueeze(-1) for part in grid.fit(clipped))
        change = (groups - grid.decode(grid.encode(clipped, scale, zero), scale, zero)).transpose(0, 1)
        seen = change @ metric
        square = metric.shape[1] == metric.shape[2]
        error = (seen * change if square else seen.square()).sum(-1).T
        better = error < smallest
        best, smallest = torch.where(better, limit, best), torch.where(better, error, smallest)
    return best
