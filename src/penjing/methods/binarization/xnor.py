"""XNOR-Net's binary weights: signs and one scale per row or group; with a higher order, signs of what is left as well.

For a group w of n weights and a sign vector b, |w - a b|^2 is least, over both, at

    b = sign(w)        a = mean |w|        |w - a b|^2 = |w|^2 - n a^2

since a = b^T w / n and no other b makes b^T w larger. Order 2 and more: the same again on the residual w - a b, and so
on, so that an error never grows. `weighted` replaces the mean by one in which input j counts as its mean square over
the calibration tokens, the best scale for independent inputs.

Worked example: w = [1, -3, 2]: b = [1, -1, 1], a = 2, error 14 - 3 * 4 = 2. Order 2: the residual [-1, -1, 0] has
a = 2/3 and leaves 2 - 3 * 4/9 = 2/3.

Sources: Rastegari et al. 2016, "XNOR-Net" (arXiv:1603.05279), eq. 4 to 6; the higher order Li et al. 2017, "Performance
Guaranteed Network Acceleration via High-Order Residual Quantization" (arXiv:1708.08687).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Literal

import torch
from pydantic import BeforeValidator, Field

from penjing.methods.base import LinearInput, Options, StatisticType
from penjing.methods.quantization.bcq import bcq
from penjing.numerics.binary_coding import BinaryGrid
from penjing.representations import BinaryCoded, Masked, Scheme
from penjing.statistics import ColumnNorm


class XNOROptions(Options):
    """Recipe keys of XNOR and residual binarisation."""

    order: int = Field(1, ge=1, le=4, description="sums of signs: 1 is XNOR-Net, more code what the ones before left")
    group_size: Annotated[
        Annotated[int, Field(ge=2)] | Literal["channel"],
        BeforeValidator(lambda size: "channel" if size == -1 else size),
    ] = Field("channel", description="consecutive inputs that share a scale; `channel` (or -1): the row")
    weighted: bool = Field(False, description="errors count by the mean square of their inputs")

    def grid(self, storage_dtype: torch.dtype) -> BinaryGrid:
        """The grid these keys describe."""
        return BinaryGrid(self.order, None if self.group_size == "channel" else self.group_size, storage_dtype)

    def scheme(self, before: Scheme, storage_dtype: torch.dtype) -> Scheme:
        return replace(before, grid=self.grid(storage_dtype))


def needs(options: XNOROptions) -> tuple[StatisticType, ...]:
    """Squares of the inputs when they count."""
    return (ColumnNorm,) if options.weighted else ()


def linear(given: LinearInput, options: XNOROptions) -> BinaryCoded | Masked:
    """Binarise one linear, or the stacked rows of several. The greedy start of binary coding is this method."""
    importance = given.statistics[ColumnNorm].value if options.weighted else None
    grid = options.grid(given.storage_dtype)
    return bcq(given.weight, grid, importance=importance, rounds=0, kept=given.kept)
