"""GPTQ: round column by column, and let the columns not yet rounded make up for the error.

Minimises the change of the layer's output, ||(W - Q) X||^2 = tr((W - Q) H (W - Q)^T) with H = X X^T, greedily. With U
upper, H^-1 = U^T U, columns i = 0, 1, ... in the chosen order:

    q_i = round(w_i)        e_i = (w_i - q_i) / U[i, i]        w_j -= e_i U[i, j]   for j > i

The loss is the sum of all |e_i|^2. H is damped by a fraction of its mean diagonal.

Worked example. W = [[0.6, 0.8]], H = [[2, 1], [1, 1]] (undamped), natural order, a grid of whole numbers:

    H^-1 = [[1, -1], [-1, 2]] = U^T U   with   U = [[1, -1], [0, 1]]
    q_0 = round(0.6) = 1      e_0 = (0.6 - 1) / 1 = -0.4      w_1 = 0.8 - (-0.4)(-1) = 0.4
    q_1 = round(0.4) = 0      e_1 = (0.4 - 0) / 1 =  0.4      loss = 0.4^2 + 0.4^2 = 0.32

Rounding to nearest gives [[1, 1]] with loss 0.52.

With `asymmetric`, the output to keep is that of the dense model, W X' with X' the inputs it would have had, and not W X
with the inputs X that compressed blocks left. That is another weight to start from; the sweep goes on as above:

    ||Q X - W X'||^2 = ||(Q - W*) X||^2 + constant        W* = W + W C H^-1        C = (X' - X) X^T

Of that step, the part is taken that the calibration tokens support (see `penjing.numerics.asymmetric`). With `stream`
as well, linears that write to the residual stream also make up for what that lost in the blocks before.

The defaults, most active inputs first and groups fitted beforehand, keep groups contiguous, so that no group index is
stored, and had the lowest loss on held-out tokens of SmolLM2-135M among the five combinations tried. `group-activation`
also keeps groups contiguous when they are fitted during the sweep (the idea of GPTQModel's group-aware reordering).

Differences from the authors' code, on purpose: a scale fitted during the sweep sees the weights as they are when the
sweep reaches the group (theirs misses the updates of the block in progress); scales are rounded to their storage type
before codes are computed.

With `descent`, every weight is looked at again once all are fixed, and every scale, in rounds (see
`penjing.numerics.descent`).

Sources: Frantar, Ashkboos, Hoefler, Alistarh 2023, "GPTQ" (arXiv:2210.17323), algorithm 1. Li et al. 2025, "GPTAQ"
(arXiv:2504.02692), asymmetric calibration.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from penjing.methods.base import LinearInput
from penjing.methods.results import fitted, quantized, with_mask
from penjing.methods.typed_grid import SearchedGridOptions
from penjing.numerics.asymmetric import towards_dense
from penjing.numerics.cholesky import STRONGEST_DAMPING, damped, dead_columns, inverse_factor
from penjing.numerics.descent import best_scales, descend
from penjing.numerics.float_grids import ScaledGrid
from penjing.numerics.grids import IntegerGrid
from penjing.numerics.scale_search import ScaleSearch, fit_group, free_scales, metric_of_sweep, part_of
from penjing.numerics.sweep import block_bounds, sweep
from penjing.representations import Masked, Quantized, Scheme
from penjing.statistics import CrossGram, Gram, StatisticType, StreamGap

Order = Literal["natural", "activation", "group-activation"]


class GPTQOptions(SearchedGridOptions):
    """Recipe keys of GPTQ."""

    block_size: int = Field(128, ge=1, description="columns whose updates are batched; changes speed, not the result")
    damping: float = Field(0.01, ge=0, description="added to the Hessian's diagonal, relative to its mean")
    order: Order = Field(
        "activation",
        description="which inputs are rounded first: as they come, the most active first, or the most active group "
        "first and inside it the most active first (groups stay contiguous)",
    )
    static_groups: bool = Field(
        True,
        description="fit all scales before the sweep, on the original weights; if not, when the sweep reaches a group "
        "(with order `activation` that needs a stored group index)",
    )

    asymmetric: bool = Field(
        False, description="keep the outputs of the dense model, whose inputs differ from those compressed blocks leave"
    )
    stream: bool = Field(
        False,
        description="with `asymmetric`: linears that write to the residual stream make up for what it lost before them",
    )

    descent: int = Field(
        0, ge=0, description="rounds of coordinate descent after the sweep, scales refitted by least squares after each"
    )

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if self.descent and not self.static_groups:
            raise ValueError("`descent` needs `static_groups: true`: late groups are fitted as the sweep reaches them")
        if self.stream and not self.asymmetric:
            raise ValueError("`stream: true` goes with `asymmetric: true`")
        if not self.static_groups and isinstance(self.group_size, int) and not self.fits_group_by_group:
            raise ValueError(
                "scales of type nvfp4 and of K-quants, and double-quantised ones, are coded together; they need "
                "`static_groups: true`"
            )
        return self

    def scheme(self, before: Scheme, storage_dtype: torch.dtype) -> Scheme:
        """Adds the grid, and whether groups hold scattered inputs so that a group index must be stored."""
        scattered = self.order == "activation" and not self.static_groups and isinstance(self.group_size, int)
        return replace(super().scheme(before, storage_dtype), ordered=scattered)


def gptq(
    weight: Tensor,
    gram: Tensor,
    grid: ScaledGrid,
    *,
    block_size: int = 128,
    damping: float = 0.01,
    order: Order = "activation",
    static_groups: bool = True,
    kept: Tensor | None = None,
    scale_search: ScaleSearch = "none",
    cross: Tensor | None = None,
    gap: Tensor | None = None,
    descent: int = 0,
) -> Quantized | Masked:
    """Quantise `weight` (N, K) given `gram` (K, K), the sum of outer products of its inputs.

    With `cross` (2, K, K), the value of `CrossGram`, the outputs of the dense model are aimed at, and with `gap`
    (2, N, K), that of `StreamGap`, its residual stream. For `scale_search` see `metric_of_sweep`. `descent` rounds need
    `static_groups`.

    Weights outside `kept` (bool (N, K)) become exactly zero and their error is compensated like any other. Inputs
    that were never active count as zero weights. With order `activation` and groups fitted during the sweep, the result
    has a `group_index`. Warns with `DampingWarning` when the Gram matrix needs more damping than asked for.
    """
    rows, columns = weight.shape
    width = grid.columns_per_group(columns)
    visited = visiting_order(gram.diagonal(), width, order)
    factor, damping = inverse_factor(gram[visited][:, visited], damping)
    if cross is not None and damping <= STRONGEST_DAMPING:
        weight = towards_dense(weight, cross, factor, visited, gap)
    weight = weight.float().masked_fill(dead_columns(gram), 0)
    metric = metric_of_sweep(gram, factor, visited, scale_search)
    fit_in_sweep = not static_groups and isinstance(grid.group_size, int)
    scattered = fit_in_sweep and order == "activation"
    group_of = (torch.arange(columns) if scattered else visited) // width
    ends = _segment_ends(group_of) if fit_in_sweep else {}

    current = weight[:, visited].T.contiguous()
    mask = None if kept is None else kept[:, visited].T.contiguous()
    fit = fitted(weight if kept is None else weight * kept, grid, None if fit_in_sweep else metric)
    scale, zero = fit.scale.T.contiguous(), fit.zero.T.contiguous()
    codes = torch.empty(columns, rows, dtype=grid.code_dtype)
    groups, places = group_of.tolist(), visited.tolist()

    def round_column(position: int, column: Tensor) -> Tensor:
        group = groups[position]
        if position in ends:
            members = slice(position, ends[position])
            visible = current[members] if mask is None else current[members] * mask[members]
            scale[group], zero[group] = fit_group(visible.T, grid, part_of(metric, visited[members]))
        if mask is not None:
            column = column * mask[position]
        code = grid.encode(column, scale[group], zero[group])
        codes[places[position]] = code
        values = grid.decode(code, scale[group], zero[group])
        return values if mask is None else values * mask[position]

    sweep(current, factor, block_bounds(columns, block_size, ends), round_column)
    if descent and damping <= STRONGEST_DAMPING:
        hessian, wanted = damped(gram, damping), weight[:, visited].T.contiguous()
        in_order = hessian[visited][:, visited]
        refits = isinstance(grid, IntegerGrid) and not grid.offset and fit.scale_codes is None and free_scales(grid)
        for number in range(descent + 1):
            if number:
                descend(current, wanted, in_order, block_bounds(columns, block_size), round_column)
            if refits:
                basis = codes.T - grid.spread(zero.T, columns)
                basis = basis if kept is None else basis * kept
                best = best_scales(basis, weight, hessian, scale.T, width).to(grid.scale_dtype).float()
                scale.copy_(best.T)
                current.copy_((basis * grid.spread(best, columns))[:, visited].T)
    index = torch.empty(columns, dtype=torch.int32).index_copy_(0, visited, group_of.int()) if scattered else None
    scale, zero = scale.T.contiguous(), zero.T.contiguous()
    return with_mask(quantized(codes.T.contiguous(), scale, zero, grid, index, fit.scale_codes, fit.zero_codes), kept)


def visiting_order(activity: Tensor, width: int, order: Order) -> Tensor:
    """The permutation (K,) in which columns are visited, from the `activity` (K,) of each: diag(H)."""
    columns = torch.arange(len(activity))
    if order == "natural":
        return columns
    by_activity = activity.argsort(descending=True, stable=True)
    if order == "activation":
        return by_activity
    group = columns // width
    padded = torch.nn.functional.pad(activity, (0, -len(activity) % width), value=-torch.inf)
    strongest = padded.view(-1, width).amax(1)
    rank = torch.empty_like(strongest, dtype=torch.long)
    rank[strongest.argsort(descending=True, stable=True)] = torch.arange(len(strongest))
    return by_activity[rank[group[by_activity]].argsort(stable=True)]


def _segment_ends(group_of: Tensor) -> dict[int, int]:
    """First position -> one past the last, of every run of columns that share a group."""
    cuts = [0, *(group_of.diff().nonzero().squeeze(1) + 1).tolist(), len(group_of)]
    return dict(pairwise(cuts))


def linear(given: LinearInput, options: GPTQOptions) -> Quantized | Masked:
    """Quantise one linear, or the stacked rows of several that share their inputs."""
    gap = given.statistics[StreamGap].value if StreamGap in given.statistics else None
    return gptq(
        given.weight,
        given.statistics[Gram].value,
        options.grid(given.storage_dtype),
        block_size=options.block_size,
        damping=options.damping,
        order=options.order,
        static_groups=options.static_groups,
        kept=given.kept,
        scale_search=options.scale_search,
        cross=given.statistics[CrossGram].value if options.asymmetric else None,
        gap=gap if options.stream and gap is not None and gap.numel() else None,
        descent=options.descent,
    )


def needs(options: GPTQOptions) -> tuple[StatisticType, ...]:
    """What a step looks at."""
    return Gram, *([CrossGram] if options.asymmetric else []), *([StreamGap] if options.stream else [])
