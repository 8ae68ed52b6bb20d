"""Round to nearest: every weight goes to the closest point of its group's grid. The baseline of all others.

No calibration, no interaction between weights: for each group fit scale `s` and zero point `z` (see
`penjing.numerics.grids` for the rules, `penjing.numerics.float_grids` for what is not uniform), then

    q = clamp(round(w / s) + z, low, high)        w_hat = s (q - z)        |w - w_hat| <= s / 2 inside the range

Worked example, 3 bits, symmetric, scale rule `narrow` (s = max|w| / 3), one scale per row:

    W = [[0.5, -1.5 ],      s = [0.5, 0.5]      q = [[1, -3],      W_hat = [[0.5, -1.5],
         [1.5,  0.25]]                               [3,  0]]               [1.5,  0.0]]

(0.25 / 0.5 is a tie and goes to the even code 0.)

Source: folklore; as the baseline of Frantar et al. 2023 (arXiv:2210.17323).
"""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.methods.base import LinearInput
from penjing.methods.results import fitted, quantized, with_mask
from penjing.methods.typed_grid import SearchedGridOptions
from penjing.numerics.float_grids import ScaledGrid
from penjing.numerics.strips import strips
from penjing.representations import Masked, Quantized
from penjing.statistics import ColumnNorm, Gram, StatisticType


def rtn(
    weight: Tensor, grid: ScaledGrid, *, kept: Tensor | None = None, metric: Tensor | None = None
) -> Quantized | Masked:
    """Round `weight` (N, K), finite, to `grid`; weights outside `kept` (bool (N, K)) become exactly zero.

    With a `metric`, (K,) or (K, K), scales are searched for the least error it gives (see `numerics.scale_search`).

    Scales are fitted on the surviving weights only. Zero is a point of every grid, so masking loses nothing.
    """
    weight = weight.float()
    if kept is not None:
        weight = weight * kept
    fit, columns = fitted(weight, grid, metric), weight.shape[1]
    codes = torch.empty(weight.shape, dtype=grid.code_dtype, device=weight.device)
    for rows in strips(weight):
        codes[rows] = grid.encode(weight[rows], *(grid.spread(each[rows], columns) for each in (fit.scale, fit.zero)))
    coded = quantized(codes, fit.scale, fit.zero, grid, scale_codes=fit.scale_codes, zero_codes=fit.zero_codes)
    return with_mask(coded, kept)


def linear(given: LinearInput, options: SearchedGridOptions) -> Quantized | Masked:
    """Round one linear, or the stacked rows of several."""
    wanted = needs(options)
    metric = given.statistics[wanted[0]].value if wanted else None
    if options.scale_search == "weights":
        metric = torch.ones(given.weight.shape[1])
    return rtn(given.weight, options.grid(given.storage_dtype), kept=given.kept, metric=metric)


def needs(options: SearchedGridOptions) -> tuple[StatisticType, ...]:
    """Nothing, unless scales are searched by what errors cost."""
    return {"none": (), "weights": (), "diagonal": (ColumnNorm,), "gram": (Gram,)}[options.scale_search]
