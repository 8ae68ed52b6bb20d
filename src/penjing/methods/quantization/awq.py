"""AWQ: protect the input channels that carry large activations by scaling their weights up before rounding.

Scaling. Rounding W diag(s) and dividing the inputs by s keeps the function and shrinks the rounding error of channels
with s_j > 1. With a_j = mean|x_j| and normalised so that the largest and smallest scale are inverse to each other,

    s = a**r / sqrt(max(a**r) min(a**r))                         `activation`: the paper
    s = a**r / (m**(1-r) + 1e-4), normalised likewise            `duo`: AutoAWQ, llm-compressor

where m_j is the mean over rows of |W_ij| relative to the largest weight of its group. The exponent r is searched on a
grid: the weights are rounded, the smallest module that holds all readers of the input is run, and the r with the
smallest squared change of its output wins. s = 1 is always a candidate, so the search never makes things worse.

Clipping. For every output and group, weights are limited to a fraction 1, 0.95, ..., 0.55 of the group's largest
before the grid is fitted; the fraction with the smallest error of the group's share of the output,
sum_t (x_t . (w - w_hat))^2, wins.

Worked example of the scale: a = [4, 1], r = 0.5:  a**r = [2, 1],  s = [2, 1] / sqrt(2) = [1.414, 0.707].

Source: Lin et al. 2024, "AWQ: Activation-aware Weight Quantization" (arXiv:2306.00978), section 3.2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn

from penjing.methods.base import BlockInput, Call, GroupSizeOrBlock, LinearInput, Scales
from penjing.methods.quantization.rtn import rtn
from penjing.methods.typed_grid import TypedGridOptions
from penjing.models.layout import InputGroup
from penjing.numerics.clipping import clip_limits
from penjing.numerics.float_grids import ScaledGrid
from penjing.numerics.modules import is_linear, weight_of
from penjing.representations import Masked, Quantized
from penjing.statistics import MeanAbs, TokenSample

Scaling = Literal["activation", "duo"]


class AWQOptions(TypedGridOptions):
    """Recipe keys of AWQ."""

    symmetric: bool = Field(False, description="no zero point; AWQ is published with one")
    steps: int = Field(20, ge=1, description="exponents tried between 0 and 1, and fractions of the clip search")
    scaling: Scaling = Field("activation", description="scale from activations (paper), or from weights too (`duo`)")
    clip: bool = Field(True, description="search a clipping limit per output and group before rounding")
    clip_ignore: tuple[str, ...] = Field(
        ("*q_proj", "*k_proj", "*qkv_proj", "*query_key_value", "*c_attn"),
        description="linears never clipped: errors of queries and keys are multiplied with each other",
    )

    @field_validator("group_size")
    @classmethod
    def _per_row(cls, value: GroupSizeOrBlock) -> GroupSizeOrBlock:
        if value in ("tensor", "block"):
            raise ValueError(f"awq searches row by row; use a number or `channel`, not `{value}`")
        return value


def awq_scale(activity: Tensor, ratio: float, weight_level: Tensor | None = None) -> Tensor:
    """Scale (K,) for exponent `ratio` from mean |x_j| (K,), and for `duo` the mean relative |w_j| (K,).

    Channels that were never active get scale 1 and do not take part in the normalisation.
    """
    scale = activity.float() ** ratio
    if weight_level is not None:
        scale = scale / (weight_level ** (1 - ratio) + 1e-4)
    live = activity > 0
    if not live.any():
        return torch.ones_like(scale)
    scale = scale.clamp(min=1e-4)
    return torch.where(live, scale / (scale[live].max() * scale[live].min()).sqrt(), 1)


def awq(
    activity: Tensor,
    linears: Sequence[nn.Module],
    inside: nn.Module,
    calls: Sequence[Call],
    grid: ScaledGrid,
    *,
    steps: int = 20,
    scaling: Scaling = "activation",
) -> Tensor:
    """Best scale (K,) for the shared input of `linears`, judged on the output of `inside` over `calls`.

    `activity` (K,) is the mean magnitude of each input. The weights of `linears` are changed while the search runs and
    restored before it returns, also when it fails.
    """
    with _borrowed_weights(linears) as (originals, write):
        level = _relative_level(originals, grid) if scaling == "duo" else None
        reference = [_output(inside, call) for call in calls]
        best, smallest = torch.ones_like(activity, dtype=torch.float32), float("inf")
        candidates = [best, *(awq_scale(activity, step / steps, level) for step in range(steps))]
        for scale in candidates[1:] if level is None else candidates:
            write(lambda weight, scale=scale: rtn(weight * scale, grid).dense() / scale)
            pairs = zip(calls, reference, strict=True)
            error = sum(float((_output(inside, call) - wanted).square().sum()) for call, wanted in pairs)
            if error < smallest:
                best, smallest = scale, error
    return best


@contextmanager
def _borrowed_weights(linears: Sequence[nn.Module]) -> Iterator[tuple[list[Tensor], Callable[..., None]]]:
    """The weights (N, K) in fp32, and a function that rewrites every module's weight from them."""
    views = [weight_of(linear) for linear in linears]
    saved = [view.clone() for view in views]
    originals = [weight.float() for weight in saved]

    def write(change: Callable[[Tensor], Tensor]) -> None:
        for view, weight in zip(views, originals, strict=True):
            view.copy_(change(weight))

    try:
        with torch.no_grad():
            yield originals, write
    finally:
        for view, weight in zip(views, saved, strict=True):
            view.copy_(weight)


def _output(module: nn.Module, call: Call) -> Tensor:
    result = module(*call.args, **call.kwargs)
    return (result[0] if isinstance(result, tuple) else result).float()


def _relative_level(weights: Sequence[Tensor], grid: ScaledGrid) -> Tensor:
    """Mean over all rows of |w| relative to the largest of its group: (K,)."""
    stacked = torch.cat(list(weights)).abs()
    rows, columns = stacked.shape
    width = grid.columns_per_group(columns)
    padded = nn.functional.pad(stacked, (0, -columns % width)).view(rows, -1, width)
    relative = padded / (padded.amax(-1, keepdim=True) + 1e-6)
    return relative.view(rows, -1)[:, :columns].mean(0)


def _foldable(module: nn.Module, group: InputGroup) -> bool:
    """A linear takes the scale only if its outputs are these inputs one to one: not so in grouped-query attention."""
    if group.source is None:
        return False
    source = module.get_submodule(group.source)
    reader = weight_of(module.get_submodule(group.linears[0]))
    return not is_linear(source) or weight_of(source).shape[0] == reader.shape[1]


def transform(block: BlockInput, options: AWQOptions) -> Scales:
    """Scales for every group of the block that can take one."""
    scales: Scales = {}
    for group in block.groups:
        if not _foldable(block.module, group):
            continue
        activity = block.statistics[group.linears[0]][MeanAbs].value
        resolved = options.for_matrix((1, len(activity)), block.storage_dtype)
        scales[group] = awq(
            activity,
            [block.module.get_submodule(name) for name in group.linears],
            block.module.get_submodule(group.inside),
            block.calls[group.inside],
            resolved.grid(block.storage_dtype),
            steps=options.steps,
            scaling=options.scaling,
        )
    return scales


def linear(given: LinearInput, options: AWQOptions) -> Quantized | Masked:
    """Clip and round one linear, or the stacked rows of several; the scales are already in the weights."""
    grid = options.grid(given.storage_dtype)
    weight = given.weight if given.kept is None else given.weight * given.kept
    if options.clip:
        limits = clip_limits(weight, given.statistics[TokenSample].value, grid, steps=options.steps)
        first = 0
        for name, rows in given.parts:
            if any(fnmatch(name, pattern) for pattern in options.clip_ignore):
                limits[first : first + rows] = torch.inf
            first += rows
        limits = grid.spread(limits, weight.shape[1])
        weight = weight.clamp(-limits, limits)
    return rtn(weight, grid, kept=given.kept)
