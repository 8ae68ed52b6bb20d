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

With `two_sided`, a column is not rounded weight by weight: errors of different outputs make up for each other as well,
by what gradients of the model's predictions say of the outputs (see `penjing.numerics.output_feedback`).

With `descent`, every weight is looked at again once all are fixed, and every scale, in rounds (see
`penjing.numerics.descent`).

Sources: Frantar, Ashkboos, Hoefler, Alistarh 2023, "GPTQ" (arXiv:2210.17323), algorithm 1. Li et al. 2025, "GPTAQ"
(arXiv:2504.02692), asymmetric calibration. Tseng, Sun, De Sa 2025, "Model-Preserving Adaptive Rounding"
(arXiv:2505.22988), feedback from both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from penjing.methods.base import LinearInput
from penjing.methods.results import Fit, fitted, quantized, with_mask
from penjing.methods.typed_grid import FLOAT_TYPES, SearchedGridOptions
from penjing.numerics.asymmetric import towards_dense
from penjing.numerics.cholesky import STRONGEST_DAMPING, damped, dead_columns, inverse_factor
from penjing.numerics.descent import best_scales, descend
from penjing.numerics.float_grids import ScaledGrid
from penjing.numerics.grids import IntegerGrid
from penjing.numerics.output_feedback import OutputFeedback
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
        False,
        description="keep the outputs of the dense model, whose inputs differ from those compressed blocks leave; "
        "experts, which other tokens reach in the dense model, keep the outputs of their own inputs",
    )
    stream: bool = Field(
        False,
        description="with `asymmetric`: linears that write to the residual stream make up for what it lost before them",
    )

    two_sided: bool = Field(
        False,
        description="errors of different outputs make up for each other, too, as gradients of the model's predictions "
        "say (YAQA), from one more pass forward and back through the dense model; grids of integers only",
    )

    descent: int = Field(
        0, ge=0, description="rounds of coordinate descent after the sweep, scales refitted by least squares after each"
    )

    @model_validator(mode="after")
    def _check_groups(self) -> Self:
        if self.descent and not self.static_groups:
            raise ValueError("`descent` needs `static_groups: true`: late groups are fitted as the sweep reaches them")
        if self.descent and self.two_sided:
            raise ValueError("`descent` takes outputs one by one, which would undo `two_sided`; drop one of them")
        if self.two_sided and self.type in FLOAT_TYPES:
            raise ValueError(f"`two_sided` rounds to integers; drop it for type {self.type}")
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
    output_grams: Sequence[Tensor] = (),
) -> Quantized | Masked:
    """Quantise `weight` (N, K) given `gram` (K, K), the sum of outer products of its inputs.

    With `cross` (2, K, K), the value of `CrossGram`, the outputs of the dense model are aimed at, and with `gap`
    (2, N, K), that of `StreamGap`, its residual stream. For `scale_search` see `metric_of_sweep`. `descent` rounds need
    `static_groups`.

    With `output_grams`, blocks along the diagonal of the Gram matrix (N, N) of gradients by the outputs, and a grid of
    integers, errors of different outputs make up for each other as well.

    Weights outside `kept` (bool (N, K)) become exactly zero and their error is compensated like any other. Inputs
    that were never active count as zero weights. With order `activation` and groups fitted during the sweep, the result
    has a `group_index`. Warns with `DampingWarning` when a Gram matrix needs more damping than asked for.
    """
    columns = weight.shape[1]
    width = grid.columns_per_group(columns)
    visited = visiting_order(gram.diagonal(), width, order)
    factor, damping = inverse_factor(gram[visited][:, visited], damping)
    if cross is not None and damping <= STRONGEST_DAMPING:
        weight = towards_dense(weight, cross, factor, visited, gap)
    weight = weight.float().masked_fill(dead_columns(gram), 0)
    metric = metric_of_sweep(gram, factor, visited, scale_search)
    late = not static_groups and isinstance(grid.group_size, int)
    scattered = late and order == "activation"
    group_of = (torch.arange(columns) if scattered else visited) // width
    fit = fitted(weight if kept is None else weight * kept, grid, None if late else metric)
    outputs = OutputFeedback(output_grams, grid) if output_grams and isinstance(grid, IntegerGrid) else None
    work = _Columns(weight, grid, fit, visited, group_of, kept, outputs)
    if late:
        work.fit_late(metric)
    sweep(work.current, factor, block_bounds(columns, block_size, work.ends), work.round)
    if descent and damping <= STRONGEST_DAMPING:
        work.descend(weight, damped(gram, damping), block_bounds(columns, block_size), descent)
    return work.result(scattered)


class _Columns:
    """The matrix that is swept: its columns are rows (K, N), in the order in which they are visited.

    current  weights not yet rounded, values of those that are
    ends     first position -> one past the last, of every group whose scale is fitted when the sweep reaches it
    """

    def __init__(
        self,
        weight: Tensor,
        grid: ScaledGrid,
        fit: Fit,
        visited: Tensor,
        group_of: Tensor,
        kept: Tensor | None,
        outputs: OutputFeedback | None,
    ) -> None:
        self.current = weight[:, visited].T.contiguous()
        self.ends: dict[int, int] = {}
        self._grid, self._fit, self._kept, self._visited, self._group_of = grid, fit, kept, visited, group_of
        self._outputs = outputs
        self._mask = None if kept is None else kept[:, visited].T.contiguous()
        self._scale, self._zero = fit.scale.T.contiguous(), fit.zero.T.contiguous()
        self._codes = torch.empty(self.current.shape, dtype=grid.code_dtype)  # in the order of the matrix
        self._groups, self._places = group_of.tolist(), visited.tolist()
        self._metric: Tensor | None = None

    def fit_late(self, metric: Tensor | None) -> None:
        """Fit every group anew when the sweep reaches it."""
        self.ends, self._metric = _segment_ends(self._group_of), metric

    def round(self, position: int, column: Tensor) -> Tensor:
        """The grid point next to each weight of a column (N,); codes are noted."""
        group = self._groups[position]
        if position in self.ends:
            members = slice(position, self.ends[position])
            visible = self.current[members] if self._mask is None else self.current[members] * self._mask[members]
            metric = part_of(self._metric, self._visited[members])
            self._scale[group], self._zero[group] = fit_group(visible.T, self._grid, metric)
        code = self._encode(position, column, self._scale[group], self._zero[group])
        self._codes[self._places[position]] = code
        values = self._grid.decode(code, self._scale[group], self._zero[group])
        return values if self._mask is None else values * self._mask[position]

    def _encode(self, position: int, column: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes (N,) of a column."""
        kept = None if self._mask is None else self._mask[position]
        if self._outputs is not None:
            return self._outputs.encode(column, scale if kept is None else scale * kept, zero)
        return self._grid.encode(column if kept is None else column * kept, scale, zero)

    def descend(self, weight: Tensor, hessian: Tensor, bounds: list[int], rounds: int) -> None:
        """Improve what a sweep left: scales, and in every round codes and scales; `hessian` (K, K) is damped."""
        wanted, in_order = weight[:, self._visited].T.contiguous(), hessian[self._visited][:, self._visited]
        self._fit_scales(weight, hessian)
        for _ in range(rounds):
            descend(self.current, wanted, in_order, bounds, self.round)
            self._fit_scales(weight, hessian)

    def _fit_scales(self, weight: Tensor, hessian: Tensor) -> None:
        """By least squares, where every scale is a number of its own."""
        grid, columns = self._grid, weight.shape[1]
        if not isinstance(grid, IntegerGrid) or grid.offset or self._fit.scale_codes or not free_scales(grid):
            return
        basis = self._codes.T - grid.spread(self._zero.T, columns)
        basis = basis if self._kept is None else basis * self._kept
        width = grid.columns_per_group(columns)
        scale = best_scales(basis, weight, hessian, self._scale.T, width).to(grid.scale_dtype).float()
        self._scale.copy_(scale.T)
        self.current.copy_((basis * grid.spread(scale, columns))[:, self._visited].T)

    def result(self, scattered: bool) -> Quantized | Masked:
        """What was rounded; `scattered` groups need an index."""
        index = None
        if scattered:
            index = torch.empty(len(self._visited), dtype=torch.int32)
            index.index_copy_(0, self._visited, self._group_of.int())
        codes, scale, zero = (each.T.contiguous() for each in (self._codes, self._scale, self._zero))
        done = quantized(codes, scale, zero, self._grid, index, self._fit.scale_codes, self._fit.zero_codes)
        return with_mask(done, self._kept)


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
    cross = given.statistics.get(CrossGram) if options.asymmetric else None
    gap = given.statistics.get(StreamGap) if options.stream else None
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
        cross=cross.value if cross is not None else None,
        gap=gap.value if gap is not None and gap.value.numel() else None,
        descent=options.descent,
        output_grams=given.output_grams if options.two_sided else (),
    )


def needs(options: GPTQOptions) -> tuple[StatisticType, ...]:
    """What a step looks at."""
    return Gram, *([CrossGram] if options.asymmetric else []), *([StreamGap] if options.stream else [])


def rough(options: GPTQOptions) -> GPTQOptions:
    """The sweep alone: its loss tells how many bits a linear needs, and what is made up for elsewhere does not."""
    return options.model_copy(update={"asymmetric": False, "stream": False, "two_sided": False, "descent": 0})
