"""Magnitude pruning: remove the smallest weights. The baseline of all others; needs no calibration unless refitted.

The score of a weight is |w|. The smallest scores go: of each row, of the whole matrix, or of every M consecutive
inputs (N:M). Counts are exact: ties are broken by position, never by a threshold.

Worked example, W = [[1, -4], [2, 3]], half of the weights removed:

    per row    [[0, -4], [0, 3]]           per layer    [[0, -4], [0, 3]]
    and with W = [[1, -2], [4, 3]]:
    per row    [[0, -2], [4, 0]]           per layer    [[0,  0], [4, 3]]

Source: Han et al. 2015, "Learning both Weights and Connections" (arXiv:1506.02626).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from penjing.methods.base import LinearInput
from penjing.methods.pruning.options import RefitOptions, check_pattern_fits
from penjing.methods.results import pruned
from penjing.numerics.masks import dropped_of, keep_largest, keep_pattern
from penjing.representations import Masked

Scope = Literal["layer", "row"]


class MagnitudeOptions(RefitOptions):
    """Recipe keys of magnitude pruning."""

    scope: Scope = Field("layer", description="weights that compete: all of a linear, or those of one output")


def magnitude(
    weight: Tensor,
    sparsity: float | None = None,
    *,
    scope: Scope = "layer",
    pattern: str | None = None,
    kept: Tensor | None = None,
    storage_dtype: torch.dtype = torch.bfloat16,
) -> Masked:
    """Remove a fraction `sparsity` of `weight` (N, K), or N of every M inputs when `pattern` is given.

    Weights outside `kept` are gone already; they count towards the sparsity and stay gone.
    """
    scores = weight.float().abs()
    if pattern is not None:
        mask = keep_pattern(scores, *check_pattern_fits(pattern, weight.shape[1]), kept)
    else:
        competing = (1, -1) if scope == "layer" else weight.shape
        scores = scores.reshape(competing)
        still = None if kept is None else kept.reshape(competing)
        mask = keep_largest(scores, dropped_of(scores.shape[1], sparsity or 0), still).reshape(weight.shape)
    return pruned(weight, mask, storage_dtype)


def linear(given: LinearInput, options: MagnitudeOptions) -> Masked:
    """Prune one linear, or the stacked rows of several when rows do not compete."""
    found = magnitude(
        given.weight,
        options.sparsity,
        scope=options.scope,
        pattern=options.pattern,
        kept=given.kept,
        storage_dtype=given.storage_dtype,
    )
    return options.finish(given, found.kept)
