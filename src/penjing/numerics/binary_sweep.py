"""Binary coding of one group when later inputs make up for its error.

With U the factor of `penjing.numerics.cholesky` and U_g its block at the group, a group w that is fixed at v leaves

    |e|^2        e = (w - v) U_g^-1

whatever the later inputs do best, so (U_g^T U_g)^-1 is the group's metric. Two steps by turns: codes column by column,
with the error fed forward inside the group; the least-squares scales of these codes in that metric. The first step is
a heuristic (as in GPTQ), so that each row keeps the best of the turns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.numerics.binary_coding import (
    BinaryGrid,
    Levels,
    Nearest,
    alternating,
    greedy,
    least_squares,
    uniform,
    weighted_error,
)
from penjing.numerics.sweep import sweep


def fit(weight: Tensor, grid: BinaryGrid, rounds: int, importance: Tensor | None) -> Levels:
    """Levels of one group (N, n), as stored, that do not look at other groups.

    Greedy; improved by `rounds` of alternating, of which each row keeps the better of two starts, greedy and uniform:
    many levels from a greedy start crowd where they were first put.
    """
    offset = grid.offset_dtype is not None
    levels = greedy(weight, grid.bits, importance, offset=offset)
    if not rounds:
        return levels.stored(grid)
    found = [
        alternating(weight, start, rounds, importance, offset=offset).stored(grid)
        for start in (levels, uniform(weight, grid.bits, offset=offset))
    ]
    errors = [weighted_error(weight, levels, importance) for levels in found]
    return found[0].where(errors[0] <= errors[1], found[1])


def refit(
    current: Tensor, factor: Tensor, grid: BinaryGrid, rounds: int, turns: int, kept: Tensor | None
) -> tuple[Levels, Tensor, Tensor]:
    """The best levels found for the group `current` (n, N), its codes (N, n) and the values (n, N) it is fixed at.

    factor  the group's block of U, (n, n)
    kept    bool (N, n) or None
    """
    weight = current.T.contiguous()
    importance = factor.diagonal() ** -2
    levels = fit(weight, grid, rounds, importance if kept is None else importance * kept)
    codes, fixed = propagate(current, factor, levels, kept)
    loss = _loss(current, fixed, factor)
    best = (levels, codes, fixed)
    metric = torch.cholesky_inverse(factor, upper=True).unsqueeze(0)
    for _ in range(turns):
        levels = least_squares(
            weight, codes, metric, bits=grid.bits, offset=grid.offset_dtype is not None, kept=kept
        ).stored(grid)
        codes, fixed = propagate(current, factor, levels, kept)
        turned = _loss(current, fixed, factor)
        better = turned < loss
        loss = torch.where(better, turned, loss)
        best = (
            levels.where(better, best[0]),
            torch.where(better[:, None], codes, best[1]),
            torch.where(better, fixed, best[2]),
        )
    return best


def propagate(current: Tensor, factor: Tensor, levels: Levels, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes (N, n) of the group `current` (n, N) with errors fed forward inside it, and the values (n, N)."""
    nearest, fixed = Nearest(levels), current.clone()
    codes = torch.empty(current.shape, dtype=torch.uint8)

    def fix(position: int, column: Tensor) -> Tensor:
        code, value = nearest(column.unsqueeze(1))
        codes[position] = code.squeeze(1)
        return value.squeeze(1) if kept is None else value.squeeze(1) * kept[:, position]

    sweep(fixed, factor, [0, len(current)], fix)
    return codes.T.contiguous(), fixed


def _loss(current: Tensor, fixed: Tensor, factor: Tensor) -> Tensor:
    """What the best later inputs leave of the error of each row, (N,)."""
    return torch.linalg.solve_triangular(factor.T, current - fixed, upper=False).square().sum(0)
