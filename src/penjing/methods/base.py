"""What a method is: a function, the paper it comes from, what it needs to see and which recipe keys it takes.

The walk reads these declarations and nothing else; it never asks a method for its name. Seven shapes cover the
field, and a method may have more than one of the first six:

    transform   a block and its calls -> scales that move magnitude between neighbours without changing the function
    linear      one weight and the statistics of its inputs -> a representation
    learn       a block, its inputs and the outputs it should have -> a representation of each of its linears
    tune        the finished model and a loss of its logits -> the same codes with other scales
    select      one score per block -> the blocks to remove
    rewrite     a model's layout -> the same function with other tensors, from which all else then starts
    remake      a dense model -> another dense model, a stage of its own: fewer units, or trained weights
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from torch import Tensor, nn

from penjing.models.layout import InputGroup, Layout
from penjing.numerics.grids import IntegerGrid, ScaleRule
from penjing.numerics.observers import Observer
from penjing.representations import Activations, Representation, Scheme
from penjing.statistics import BlockStatisticType, Statistics, StatisticType


class Options(BaseModel):
    """Recipe keys of one method. An unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def for_matrix(self, shape: tuple[int, ...], storage_dtype: torch.dtype) -> Self:
        """The options with what depends on the `shape` (N, K) of a matrix worked out; ValueError if they do not fit."""
        return self

    def remark(self, shape: tuple[int, ...]) -> str:
        """What whoever reads the plan must know where a matrix of this `shape` does not get what the keys say."""
        return ""

    def declines(self, shape: tuple[int, ...]) -> str:
        """Why a step with these options leaves a matrix of `shape` as it is; empty when it does not."""
        return ""

    def scheme(self, before: Scheme, storage_dtype: torch.dtype) -> Scheme:
        """What a weight of scheme `before` becomes under a step with these options; ValueError if it cannot."""
        return before


def _spell_group(value: object) -> object:
    """`-1` is how GPTQ and AWQ users write one scale per row."""
    return "channel" if value == -1 else value


GroupSize = Annotated[
    Annotated[int, Field(ge=2)] | Literal["channel", "tensor"],
    BeforeValidator(_spell_group),
    Field(description="consecutive inputs that share a scale; `channel` (or -1): the row; `tensor`: the matrix"),
]


GroupSizeOrBlock = Annotated[
    Annotated[int, Field(ge=2)] | Literal["channel", "tensor", "block"],
    BeforeValidator(_spell_group),
    Field(
        description="consecutive inputs that share a scale; `channel` (or -1): the row; `tensor`: the matrix; `block`: "
        "128 inputs of 128 outputs (fp8)"
    ),
]


class GridKeys(Options):
    """Recipe keys of a grid of integers."""

    bits: int = Field(4, ge=2, le=8, description="bits per weight")
    group_size: GroupSizeOrBlock = 128
    symmetric: bool = Field(True, description="no zero point; the grid is centred on zero")
    scale_rule: ScaleRule = Field("full", description="how a symmetric scale follows from the largest weight")


class GridOptions(GridKeys):
    """Recipe keys of every method that rounds weights to an integer grid."""

    group_size: GroupSize = 128

    def grid(self, scale_dtype: torch.dtype) -> IntegerGrid:
        """The grid these keys describe."""
        size = None if self.group_size == "channel" else self.group_size
        return IntegerGrid(self.bits, size, self.symmetric, self.scale_rule, scale_dtype)

    def scheme(self, before: Scheme, storage_dtype: torch.dtype) -> Scheme:
        return replace(before, grid=self.grid(storage_dtype))


class ActivationOptions(Options):
    """How the inputs of a linear are quantised at run time."""

    bits: int = Field(8, ge=4, le=8, description="bits per input value")
    type: Literal["int", "fp8"] = Field("int", description="integers, or 8-bit floats (E4M3)")
    dynamic: bool = Field(True, description="scales come from each input; otherwise from the calibration text")
    granularity: Literal["token", "tensor"] = Field(
        "token", description="what shares a scale: a token, or the whole input (always so when static)"
    )
    symmetric: bool = Field(True, description="no zero point")
    observer: Observer = Field("minmax", description="how a static range is chosen from what was seen")
    percentile: float = Field(99.99, gt=50, le=100, description="of the inputs that `percentile` keeps in range")
    threshold: float | None = Field(
        None, gt=0, description="columns of a batch that reach this magnitude are multiplied as they are (LLM.int8())"
    )

    @model_validator(mode="before")
    @classmethod
    def _static_means_per_tensor(cls, keys: object) -> object:
        if isinstance(keys, dict) and keys.get("dynamic") is False:
            return {"granularity": "tensor", **keys}
        return keys

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if not self.dynamic and self.granularity == "token":
            raise ValueError("static inputs have one scale for all tokens; drop `granularity` or set it to `tensor`")
        if self.dynamic and self.observer != "minmax":
            raise ValueError(f"a dynamic range is that of each input; `observer: {self.observer}` needs dynamic: false")
        if self.type == "fp8" and (self.bits != 8 or not self.symmetric or self.observer == "entropy"):
            raise ValueError("fp8 inputs have 8 bits, no zero point, and no entropy observer, which counts levels")
        if self.threshold is not None and not (
            self.dynamic and self.symmetric and self.type == "int" and self.granularity == "token"
        ):
            raise ValueError("`threshold` goes with dynamic symmetric integers per token")
        return self

    def chosen(self) -> Activations:
        """What a scheme says of them."""
        kind: Literal["int", "float"] = "float" if self.type == "fp8" else "int"
        return Activations(self.bits, kind, self.dynamic, self.granularity, self.symmetric, self.threshold)


@dataclass(frozen=True)
class LinearInput:
    """What a linear-level method is given.

    weight         fp32 (N, K); when the method is `row_wise`, the rows of all linears that share this input
    statistics     of the linear's inputs, one per type that the method needs
    kept           bool (N, K) from an earlier pruning step, which the method must respect; None without one
    storage_dtype  the dtype in which dense values and scales are written
    parts          name and number of rows of each linear in `weight`, from top to bottom
    output_grams   Gram matrix (N, N) of the gradients of the dense model's predictions that reach the outputs, of which
                   blocks (n, n) fp32 along the diagonal are known, from top to bottom; none when no method on the
                   linear wants it (`Method.joins_outputs`) or nothing is known
    """

    weight: Tensor
    statistics: Statistics
    kept: Tensor | None = None
    storage_dtype: torch.dtype = torch.bfloat16
    parts: tuple[tuple[str, int], ...] = ()
    output_grams: Sequence[Tensor] = ()


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


@dataclass(frozen=True)
class BlockTask:
    """What a method that learns is given: a decoder block, what goes in, and what should come out.

    weights        fp32 (N, K) of each linear the step applies to, by its name inside the block; from earlier steps
                   what those made of it
    statistics     of the inputs of each linear, by its name
    run            the block's output (B, T, D) for states (B, T, D) when some linears, by name, have other weights
                   (N, K); differentiable in both
    inputs         (S, T, D), what the block will see: the outputs of the compressed blocks before it
    targets        (S, T, D), the outputs of the dense model after this block
    kept           masks of linears that an earlier step pruned
    storage_dtype  the dtype in which dense values and scales are written
    """

    weights: Mapping[str, Tensor]
    statistics: Mapping[str, Statistics]
    run: Callable[[Tensor, Mapping[str, Tensor]], Tensor]
    inputs: Tensor
    targets: Tensor
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    storage_dtype: torch.dtype = torch.bfloat16


LinearFunction = Callable[[LinearInput, Any], Representation]
LearnFunction = Callable[[BlockTask, Any], Mapping[str, Representation]]
TransformFunction = Callable[[BlockInput, Any], Scales]


@dataclass(frozen=True)
class ModelTask:
    """What a method that trains the finished model as a whole is given.

    weights  what the linears that the step applies to became, by full name
    norms    what the norms inside the blocks multiply by, fp32, by the full name of the parameter; that may hold a
             constant less (`Layout.norm_offset`)
    windows  number of calibration windows
    loss     KL(dense || model) in nats per token over some windows, when some linears have other weights (N, K) and
             some norms other values: what the function gives for a full name, None for as they are. Leaves the
             gradients in the leaves behind those tensors
    told     the same for the negative log-likelihood of the windows' own next tokens
    dtype    that of the arithmetic, into which weights may be decoded
    """

    weights: Mapping[str, Representation]
    norms: Mapping[str, Tensor]
    windows: int
    loss: Callable[[Sequence[int], Callable[[str], Tensor | None]], float]
    told: Callable[[Sequence[int], Callable[[str], Tensor | None]], float]
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Tuned:
    """What training changed: representations of linears, and what norms multiply by, by the names in `ModelTask`."""

    weights: Mapping[str, Representation]
    norms: Mapping[str, Tensor]


TuneFunction = Callable[[ModelTask, Any, Callable[[int, float], None]], Tuned]


Load = Callable[[str], Tensor]
"""One tensor of a model as it is stored, by its full name."""


@dataclass(frozen=True)
class Rewriting:
    """A model that computes the same function with other tensors: what a method that rewrites asks for.

    layout   of the rewritten model
    tensors  full name of each tensor that is not the original's -> how it is made from those, in fp32
    config   entries of config.json that change
    notes    what whoever reads the plan should know
    """

    layout: Layout
    tensors: Mapping[str, Callable[[Load], Tensor]]
    config: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


RewriteFunction = Callable[[Layout, Any], Rewriting]


@dataclass(frozen=True)
class Selection:
    """How a model-level method decides: a score per block, and the function from scores (blocks,) to those removed."""

    scores: BlockStatisticType
    choose: Callable[[Tensor, Any], list[int]]


@dataclass(frozen=True)
class Size:
    """A model that a step could leave.

    parameters  of the whole model
    blocks      it has
    keys        of the step, which ask for exactly this model
    config      gives its config.json; PlanError or ValueError where no config says so
    """

    parameters: int
    blocks: int
    keys: Mapping[str, Any]
    config: Callable[[], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class Remake:
    """A method that makes another dense model. Each kind is a subclass; `pipeline/stages.py` says who does its work.

    config       config.json of the model it makes, from the config and the layout of the one it is given; ValueError
                 if that model cannot be
    keeps_zeros  whether weights that an earlier step pruned are still zero in the model it makes
    backward     whether it looks at gradients of the text's loss, block by block
    prunes       linears of that model, by full name, of which it makes weights zero itself, and how many
    sizes        every model it could make, the largest first, from the same arguments as `config`; None when its size
                 is no choice, or a number of blocks (see `penjing.methods.pruning.sizes`)
    """

    config: Callable[[Mapping[str, Any], Layout, Any], Mapping[str, Any]]
    keeps_zeros: Callable[[Any], bool]
    backward: Callable[[Any], bool] = lambda options: False
    prunes: Callable[[Layout, Any], Mapping[str, Scheme]] = lambda layout, options: {}
    sizes: Callable[[Mapping[str, Any], Layout, Any], Sequence[Size]] | None = None


@dataclass(frozen=True)
class Method:
    """One row of the table of methods."""

    name: str
    summary: str
    paper: str
    options: type[Options]
    linear: LinearFunction | None = None
    transform: TransformFunction | None = None
    learn: LearnFunction | None = None
    tune: TuneFunction | None = None
    select: Selection | None = None
    rewrite: RewriteFunction | None = None
    remake: Remake | None = None
    reads: Literal["decoder", "encoder"] = "decoder"
    """Which kind of model it works on: one that writes on, or one that reads whole texts and classifies them."""
    needs: Callable[[Any], tuple[StatisticType, ...]] = field(default=lambda options: ())
    joins_outputs: Callable[[Any], bool] = field(default=lambda options: False)
    """Whether `linear` looks at what errors of different outputs cost together."""
    passes: Callable[[Any, int], float] = field(default=lambda options, windows: 0.0)
    """Training in units of forward passes over all calibration windows, given how many there are."""
    caution: Callable[[Any, int], str] = field(default=lambda options, parameters: "")
    """What whoever reads a plan should be told about a step, given its options and the parameters of the model."""
    rough: Callable[[Any], Options] = field(default=lambda options: options)
    """Options whose losses rank choices alike and that take less time, for measuring many choices."""
    row_wise: Callable[[Any], bool] = field(default=lambda options: True)
    """True when every row's result depends on that row alone, so that linears sharing an input go in one call."""

    @property
    def on_model(self) -> bool:
        """It works on the model as a whole, so a step of it takes no `targets`."""
        return self.select is not None or self.rewrite is not None or self.remake is not None
