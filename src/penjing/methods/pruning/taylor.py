"""Single weights by how much the loss would change without them, from gradients on a few texts.

    taylor           |w E[g]|       the first-order change of the mean loss when w goes
    taylor-per-text  E|w g_j|       of every text by itself, so that texts cannot cancel
    fisher           w^2 E[g_j^2]   the second-order change, squared gradients in place of the Hessian's diagonal
    magnitude        |w|            the control: no gradient, the same scopes

with g_j the gradient of text j. The lowest scores go: of the whole model, of each linear, of each output (row), or of
every M consecutive inputs (N:M). Counts are exact. A gradient sees what follows in the network, so scores of different
linears can be compared; a magnitude cannot tell that a linear's scale is undone by the norm after it.

Worked example. w = [1, -2], two texts with gradients [3, 0.5] and [-3, 0.5]: taylor [0, 1], per text [3, 1], fisher
[9, 1]. Half of it gone: taylor removes the first weight, the others the second.

Sources: Molchanov et al. 2017, "Pruning Convolutional Neural Networks for Resource Efficient Inference"
(arXiv:1611.06440), eq. 7, and Lee et al. 2019, SNIP (arXiv:1810.02340), eq. 5, for the first order; Theis et al. 2018,
"Faster gaze prediction with dense networks and Fisher pruning" (arXiv:1801.05787), eq. 7, for the second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from penjing.methods.base import Remake
from penjing.methods.pruning.options import ProtectOptions, SparsityOptions, check_pattern_fits
from penjing.models.layout import Layout, ModuleSpec
from penjing.numerics.masks import dropped_of, keep_largest, keep_pattern
from penjing.representations import Scheme

Criterion = Literal["taylor", "taylor-per-text", "fisher", "magnitude"]
Scope = Literal["global", "layer", "row"]


class TaylorOptions(SparsityOptions, ProtectOptions):
    """Recipe keys of pruning single weights by gradients."""

    criterion: Criterion = Field("fisher", description="which weights stay: those with the highest")
    scope: Scope = Field(
        "layer", description="weights that compete: all of the blocks, those of a linear, or those of one output"
    )


@dataclass(frozen=True)
class WeightGradients:
    """Gradients of the loss by one weight (N, K) over texts: their mean, mean magnitude, and mean square."""

    mean: Tensor
    magnitude: Tensor
    square: Tensor


@dataclass(frozen=True, kw_only=True)
class WeightPruning(Remake):
    """The same model with zeros."""


def scores(weight: Tensor, gradients: WeightGradients | None, criterion: Criterion) -> Tensor:
    """fp32 (N, K), not negative, for `weight` (N, K); `magnitude` needs no gradients.

    `fisher` is given as its root, |w| rms(g), which has the same order and does not underflow.
    """
    size = weight.float().abs()
    if criterion == "magnitude":
        return size
    assert gradients is not None
    if criterion == "taylor":
        return size * gradients.mean.abs()
    return size * (gradients.square.sqrt() if criterion == "fisher" else gradients.magnitude)


def keep(found: Tensor, options: TaylorOptions, kept: Tensor | None = None) -> Tensor:
    """bool (N, K): what stays of one linear with these scores, for scopes within it. `kept`: what is still there."""
    if options.pattern is not None:
        return keep_pattern(found, *check_pattern_fits(options.pattern, found.shape[1]), kept)
    shape = found.shape if options.scope == "row" else (1, found.numel())
    still = None if kept is None else kept.reshape(shape)
    drop = dropped_of(shape[1], options.sparsity or 0)
    return keep_largest(found.reshape(shape), drop, still).reshape(found.shape)


def pruned_linears(layout: Layout, options: TaylorOptions) -> list[ModuleSpec]:
    """The linears that the step prunes."""
    blocks = options.free_blocks(layout.blocks)
    never = layout.never or {}
    return [
        module
        for module in layout.modules
        if module.kind == "linear" and module.block in blocks and module.name not in never
    ]


def _config(config: Mapping[str, Any], layout: Layout, options: TaylorOptions) -> Mapping[str, Any]:
    """The config as it is. Raises ValueError naming a linear that the pattern does not fit."""
    for module in pruned_linears(layout, options):
        if options.zeros_of and module.shape[1] % options.zeros_of[1]:
            raise ValueError(
                f"pattern {options.pattern}: {module.name} has {module.shape[1]} inputs, which is no multiple of "
                f"{options.zeros_of[1]}; use `sparsity`"
            )
    return config


def _zeros(layout: Layout, options: TaylorOptions) -> dict[str, Scheme]:
    scheme = options.scheme(Scheme(), torch.float32)
    return {module.name: scheme for module in pruned_linears(layout, options)}


WEIGHT_PRUNING = WeightPruning(
    config=_config,
    keeps_zeros=lambda options: True,
    backward=lambda options: options.criterion != "magnitude",
    prunes=_zeros,
)
"""The row of the method."""
