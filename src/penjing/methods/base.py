"""What a method is: a function, the paper it comes from, what it needs to see and which recipe keys it takes.

The walk reads these declarations and nothing else; it never asks a method for its name. Three shapes cover the
field, and a method may have more than one of them:

    transform   a block and its calls -> scales that move magnitude between neighbours without changing the function
    linear      one weight and the statistics of its inputs -> a representation
    select      one score per block -> the blocks to remove
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field
from torch import Tensor, nn

from penjing.models.layout import InputGroup
from penjing.numerics.grids import IntegerGrid, ScaleRule
from penjing.representations import Representation, Scheme
from penjing.statistics import BlockStatisticType, Statistics, StatisticType


class Options(BaseModel):
    """Recipe keys of one method. An unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def scheme(self, before: Scheme, storage_dtype: torch.dtype) -> Scheme:
        """What a weight of scheme `before` becomes under a step with these options."""
        return before


def _spell_group(value: object) -> object:
    """`-1` is how GPTQ and AWQ users write one scale per row."""
    return "channel" if value == -1 else value


GroupSize = Annotated[
    Annotated[int, Field(ge=2)] | Literal["channel", "tensor"],
    BeforeValidator(_spell_group),
    Field(description="consecutive inputs that share a scale; `channel` (or -1): the row; `tensor`: the matrix"),
]


class GridOptions(Options):
    """Recipe keys of every method that rounds weights to an integer grid."""

    bits: int = Field(4, ge=2, le=8, description="bits per weight")
    group_size: GroupSize = 128
    symmetric: bool = Field(True, description="no zero point; the grid is centred on zero")
    scale_rule: ScaleRule = Field("full", description="how a symmetric scale follows from the largest weight")

    def grid(self, scale_dtype: torch.dtype) -> IntegerGrid:
        """The grid these keys describe."""
        size = None if self.group_size == "channel" else self.group_size
        return IntegerGrid(self.bits, size, self.symmetric, self.scale_rule, scale_dtype)

    def scheme(self, before: Scheme, storage_dtype: torch.dtype) -> Scheme:
        return replace(before, grid=self.grid(storage_dtype))


class ActivationOptions(Options):
    """How the inputs of a linear are quantised at run time: symmetric integers, one scale per token."""

    bits: Literal[8] = 8
    dynamic: Literal[True] = True


@dataclass(frozen=True)
class LinearInput:
    """What a linear-level method is given.

    weight         fp32 (N, K); when the method is `row_wise`, the rows of all linears that share this input
    statistics     of the linear's inputs, one per type that the method needs
    kept           bool (N, K) from an earlier pruning step, which the method must respect; None without one
    storage_dtype  the dtype in which dense values and scales are written
    parts          name and number of rows of each linear in `weight`, from top to bottom
    """

    weight: Tensor
    statistics: Statistics
    kept: Tensor | None = None
    storage_dtype: torch.dtype = torch.bfloat16
    parts: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Call:
    """One recorded call of a submodule: positional and keyword arguments."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


@dataclass(frozen=True)
class BlockInput:
    """What a block-level method is given: a decoder block with its weights, and how it was called.

    module      the block; weights may be changed during a search but must be restored
    groups      the input groups whose scale can be folded; only those whose linears are all targeted
    statistics  of the inputs of each linear, by its name inside the block
    calls       recorded calls of the `inside` modules, on a few calibration windows
    """

    module: nn.Module
    groups: Sequence[InputGroup]
    statistics: Mapping[str, Statistics]
    calls: Mapping[str, Sequence[Call]]
    storage_dtype: torch.dtype = torch.bfloat16


Scales = dict[InputGroup, Tensor]
"""Per input channel (K,): inputs are divided by it (in `source`), weights multiplied."""

LinearFunction = Callable[[LinearInput, Any], Representation]
TransformFunction = Callable[[BlockInput, Any], Scales]


@dataclass(frozen=True)
class Selection:
    """How a model-level method decides: a score per block, and the function from scores (blocks,) to those removed."""

    scores: BlockStatisticType
    choose: Callable[[Tensor, Any], list[int]]


@dataclass(frozen=True)
class Method:
    """One row of the table of methods."""

    name: str
    summary: str
    paper: str
    options: type[Options]
    linear: LinearFunction | None = None
    transform: TransformFunction | None = None
    select: Selection | None = None
    needs: Callable[[Any], tuple[StatisticType, ...]] = field(default=lambda options: ())
    row_wise: Callable[[Any], bool] = field(default=lambda options: True)
    """True when every row's result depends on that row alone, so that linears sharing an input go in one call."""
