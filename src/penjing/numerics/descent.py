"""After a sweep: every weight again, given all others; and every scale, given all codes.

A sweep (see `penjing.numerics.sweep`) fixes a column when the columns before it are fixed and those after it are free.
Once all are fixed, the loss of a row w - v, tr((W - V) H (W - V)^T), can still fall by one weight at a time. With all
others where they are, the best value of v_i is

    v_i + ((w - v) H)_i / H[i, i]

and on the grid the point next to that. With codes c, zero points taken off, and C_g the row c with zeros outside group
g, the best scales s of a row solve a small system:

    sum_g' (C_g H C_g'^T) s_g' = C_g H w^T        for every group g

Neither can raise the loss, but for scales being rounded to the type in which they are stored.

Worked example. w = [0.6, 0.8], H = [[2, 1], [1, 1]], v = [1, 0] after a sweep, loss 0.32. The best value of v_1 given
v_0 is 0 + (-0.4 + 0.8) / 1 = 0.4, which rounds to 0: nothing moves. One scale for c = [1, 0]: 2 s = 2 * 0.6 + 0.8, so
s = 1.

Sources: Behdin et al. 2023, "QuantEase" (arXiv:2309.01885), algorithm 1, for the weights; the scales as in the
closed-form codebooks of Kim et al. 2025, "GuidedQuant" (arXiv:2505.07004), section 3.3, for one number per group.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from penjing.numerics.sweep import Replace

_RIDGE = 1e-6
"""Of the diagonal of the system for scales: groups whose codes are alike would make it singular."""

_SYSTEMS = 1 << 24
"""Numbers in the systems that are solved at once."""


def descend(columns: Tensor, wanted: Tensor, hessian: Tensor, bounds: list[int], replace: Replace) -> None:
    """One round over the columns, the rows of `columns` and `wanted` (K, N), in place.

    hessian  H (K, K), positive definite
    bounds   of blocks of columns, whose effects on the others are taken into account together
    replace  rounds one column to the grid, as in `sweep`
    """
    pull = hessian @ (wanted - columns)
    strengths = hessian.diagonal().tolist()
    for start, stop in pairwise(bounds):
        here, changes = pull[start:stop], torch.empty_like(columns[start:stop])
        for position in range(start, stop):
            column, change = columns[position], changes[position - start]
            fixed = replace(position, column + pull[position] / strengths[position])
            torch.sub(fixed, column, out=change)
            column.copy_(fixed)
            here.addr_(hessian[start:stop, position], change, alpha=-1)
        pull[:start].addmm_(hessian[:start, start:stop], changes, alpha=-1)
        pull[stop:].addmm_(hessian[stop:, start:stop], changes, alpha=-1)


def best_scales(codes: Tensor, weight: Tensor, hessian: Tensor, scale: Tensor, width: int) -> Tensor:
    """Scales (N, G) with which `codes` (N, K), zero points taken off, lose least of `weight` (N, K); fp32.

    width  columns per group; the last group may be shorter

    A group of zeros keeps its `scale` (N, G).
    """
    rows, groups = scale.shape
    found = scale.clone()
    target = weight @ hessian
    for part in torch.arange(rows).split(max(1, _SYSTEMS // (groups * groups))):
        basis = codes[part]
        products = torch.stack(
            [_by_group(own @ hessian[first : first + width] * basis, width) for first, own in _groups(basis, width)], 1
        )
        right = _by_group(target[part] * basis, width)
        diagonal = products.diagonal(dim1=1, dim2=2)
        empty = diagonal == 0
        products.diagonal(dim1=1, dim2=2).add_(_RIDGE * diagonal + empty)
        solved = torch.linalg.solve(products, right)
        found[part] = torch.where(empty | ~solved.isfinite() | (solved == 0), scale[part], solved)
    return found


def _groups(basis: Tensor, width: int) -> list[tuple[int, Tensor]]:
    return list(zip(range(0, basis.shape[1], width), basis.split(width, 1), strict=True))


def _by_group(values: Tensor, width: int) -> Tensor:
    """Sums (n, G) over the groups of columns of (n, K)."""
    return torch.stack([part.sum(1) for part in values.split(width, 1)], 1)
