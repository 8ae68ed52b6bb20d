"""Where everything is in a model: which tensors exist, which are linears, what feeds what, what is tied.

A `Layout` is plain data made from `config.json` (and the family's facts in `families/`), so that a plan needs
neither weights nor torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

ModuleKind = Literal["linear", "embedding", "head", "norm", "router", "other"]


@dataclass(frozen=True)
class InputGroup:
    """Linears of a block that read the same activation; names are relative to the block.

    source   the module a per-channel scale of that activation can be folded into (a norm, or a linear whose
             outputs reach these linears unchanged or through an elementwise product); None if there is none
    linears  the linears that read it
    inside   the smallest module that holds them all and whose output a search should preserve
    fused    engines merge these linears into one matrix, so they must share a scheme (bits, group size)
    """

    source: str | None
    linears: tuple[str, ...]
    inside: str
    fused: bool = False


@dataclass(frozen=True)
class Residual:
    """What stands between one block and the residual stream; names are relative to the block.

    readers  norm -> the modules that read what it makes of the stream
    writers  the linears whose outputs are added to the stream
    fixed    why no other basis of the stream gives the same function; empty where any rotation does
    """

    readers: Mapping[str, tuple[str, ...]]
    writers: tuple[str, ...]
    fixed: str = ""


@dataclass(frozen=True)
class ValueHeads:
    """The attention values of a block: nothing but weighted sums over tokens lies between `value` and `output`.

    value   the linear that computes them: head h is rows `first + h * stride` to `+ size`
    output  the linear that reads them, `size` columns per query head
    """

    value: str
    output: str
    count: int
    size: int
    first: int
    stride: int


@dataclass(frozen=True)
class ModuleSpec:
    """One module that owns parameters.

    name        its full name, which is also the prefix of its tensors on disk
    kind        what it is
    block       index of the decoder block it belongs to, None outside the blocks
    tensors     parameter name ("weight", "bias", "") -> shape as stored on disk
    transposed  the weight is stored (inputs, outputs), as GPT-2's Conv1D does
    owner       the linear whose weight it computes with, having none itself; empty where it has, or needs none
    """

    name: str
    kind: ModuleKind
    block: int | None
    tensors: Mapping[str, tuple[int, ...]] = field(hash=False)
    transposed: bool = False
    owner: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weight as methods see it: (outputs, inputs)."""
        shape = self.tensors["weight"]
        return shape[::-1] if self.transposed else shape

    @property
    def expert(self) -> bool:
        """Whether it is part of an expert, which only the tokens go through that a router sends there."""
        return ".experts." in self.name

    @property
    def parameters(self) -> int:
        return sum(math.prod(shape) for shape in self.tensors.values())

    def tensor_names(self) -> list[str]:
        return [f"{self.name}.{key}" if key else self.name for key in self.tensors]


@dataclass(frozen=True)
class Layout:
    """The whole model as a list of modules plus the facts a walk needs.

    model_type   `config["model_type"]`
    family       name of the family file, or "inferred"
    modules      in the order of the forward pass: embeddings, blocks, final norm, head
    block_path   e.g. "model.layers": block i is `f"{block_path}.{i}"`
    groups       input groups of each block (blocks of a model may differ)
    tied         the head shares the embedding's weight; then no head tensor is stored
    norm_offset  added to a norm's weight in the forward pass (Gemma: 1)
    never        names of modules that must not be compressed (routers, for instance), with the reason
    residual     how each block reads and writes the residual stream; empty when it is not known
    heads        where the attention values are; None when it is not known
    scaled       embeddings are multiplied by the square root of their width (Gemma)
    encoder      it reads whole texts and classifies them, and predicts no next token (BERT)
    """

    model_type: str
    family: str
    modules: tuple[ModuleSpec, ...]
    block_path: str
    groups: tuple[tuple[InputGroup, ...], ...]
    tied: bool
    norm_offset: float = 0.0
    never: Mapping[str, str] | None = None
    residual: tuple[Residual, ...] = ()
    heads: ValueHeads | None = None
    scaled: bool = False
    encoder: bool = False

    @property
    def blocks(self) -> int:
        return len(self.groups)

    @cached_property
    def by_name(self) -> dict[str, ModuleSpec]:
        return {module.name: module for module in self.modules}

    def of_block(self, index: int | None) -> list[ModuleSpec]:
        """Modules of block `index`, or those outside every block for None."""
        return [module for module in self.modules if module.block == index]

    def block_name(self, index: int) -> str:
        return f"{self.block_path}.{index}"

    def inside_blocks(self, names: Iterable[str]) -> dict[int, list[str]]:
        """Block -> which of `names` are modules in it, without the block's own name."""
        found: dict[int, list[str]] = {}
        for name in names:
            index = self.by_name[name].block
            if index is not None:
                found.setdefault(index, []).append(name.removeprefix(f"{self.block_name(index)}."))
        return found

    @property
    def embedding(self) -> ModuleSpec:
        return next(module for module in self.modules if module.kind == "embedding")

    @property
    def head(self) -> ModuleSpec:
        """The output projection; when tied, a module without tensors of its own."""
        return next(module for module in self.modules if module.kind == "head")

    @cached_property
    def owners(self) -> dict[str, str]:
        """Linear without a weight of its own -> the linear whose weight it computes with."""
        return {module.name: module.owner for module in self.modules if module.owner}

    @property
    def parameters(self) -> int:
        return sum(module.parameters for module in self.modules)
