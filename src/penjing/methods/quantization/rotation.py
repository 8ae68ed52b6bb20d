"""QuaRot's rotations, as far as they fit into the weights: the same function, without channels that stick out.

With x a row vector of the residual stream, Q and R random Hadamard matrices, and g the weight of the RMSNorm in front
of a linear that reads the stream:

    stream    x -> x Q      embedding E -> E Q      readers W -> W diag(g) Q, norms g -> 1      writers W -> Q^T W
    heads     v -> v R      in every value head: W_v -> R^T W_v, and per query head W_o -> W_o R

Both are exact: |x Q| = |x|, so the norm divides by the same number, and attention only takes weighted sums of values
over tokens. A bias of a writer or of the values turns with its rows. Embeddings are not centred: that belongs to
LayerNorm, and moves the logits of an RMSNorm model. All of it is computed in fp64 and rounded once, to fp32, in
which the next step gets it.

The norm before the head moves into the head, so a head that was tied to the embedding becomes a matrix of its own.
Left out are the rotations that would have to be computed at run time (before `down_proj`, and of query and key after
their rotary embedding): the engines that load the result have no place for them.

Worked example: x = [10, 0], Q = [[1, 1], [1, -1]] / sqrt(2). x Q = [7.07, 7.07], and the step of a grid that spans it
is 0.7 of what it was. W = [[1, 2]] with g = [1, 3] becomes [[1, 6]] Q = [[4.95, -3.54]]; both give x . W = 10.

Source: Ashkboos et al. 2024, "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs" (arXiv:2404.00456), section 4:
stage 1a, and of stage 1c the part within each head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from penjing.errors import PlanError
from penjing.methods.base import Load, Options, Rewriting
from penjing.models.layout import Layout, ModuleSpec, ValueHeads
from penjing.numerics.hadamard import Rotation, random_hadamard

SLICE = 4096
"""Rows or columns of a matrix that are in memory in fp64 at a time, when only the other side turns."""


class RotationOptions(Options):
    """Recipe keys of the rotation."""

    residual: bool = Field(True, description="rotate the residual stream; RMSNorm models only; unties the head")
    heads: bool = Field(True, description="rotate the values within each attention head")
    seed: int = Field(0, ge=0, description="chooses the signs of the Hadamard matrices")

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        if not (self.residual or self.heads):
            raise ValueError("`residual` or `heads` must be true, or there is nothing to rotate")
        return self


@dataclass(frozen=True)
class Turn:
    """Stretches of a vector that turn: `count` of them, the first at `first`, each `stride` after the last."""

    rotation: Rotation
    count: int = 1
    first: int = 0
    stride: int = 0

    def apply_(self, x: Tensor) -> None:
        """Turn vectors (..., K), fp64, in place."""
        for number in range(self.count):
            stretch = x.narrow(-1, self.first + number * self.stride, self.rotation.size)
            stretch.copy_(self.rotation.apply(stretch))


@dataclass(frozen=True)
class Change:
    """What becomes of one module, seen as a matrix (N, K): a norm is folded in, then columns and rows turn.

    source  the module whose tensors it is made from, if not from its own
    norm    name of the norm's weight whose entries multiply the columns before they turn; empty for none
    offset  added to that weight in the forward pass
    """

    source: str
    norm: str = ""
    offset: float = 0.0
    columns: tuple[Turn, ...] = ()
    rows: tuple[Turn, ...] = ()

    def weight(self, load: Load, transposed: bool) -> Tensor:
        """The new weight, fp32, in the orientation it is stored in."""
        stored = load(f"{self.source}.weight")
        scale = load(self.norm).double() + self.offset if self.norm else None
        old = stored.T if transposed else stored
        new = torch.empty(old.shape, dtype=torch.float32)
        side = 1 if self.rows else 0
        width = old.shape[side] if self.rows and self.columns else SLICE
        for before, after in zip(old.split(width, side), new.split(width, side), strict=True):
            values = before.double().clone(memory_format=torch.contiguous_format)
            if scale is not None:
                values *= scale
            for turn in self.columns:
                turn.apply_(values)
            for turn in self.rows:
                turn.apply_(values.T)
            after.copy_(values)
        return new.T.contiguous() if transposed else new

    def bias(self, load: Load) -> Tensor:
        """The new bias, fp32."""
        values = load(f"{self.source}.bias").to(torch.float64, copy=True)
        for turn in self.rows:
            turn.apply_(values)
        return values.float()


def rewrite(layout: Layout, options: RotationOptions) -> Rewriting:
    """Which tensors of a model change, and how. Raises PlanError for a model whose function a rotation would change."""
    stream = values = None
    if options.residual:
        require_free_stream(layout, "set `residual: false` to rotate the value heads alone")
        stream = random_hadamard(layout.embedding.shape[1], options.seed)
    if options.heads:
        if layout.heads is None:
            raise PlanError(f"rotation: where {layout.model_type} has its attention values is not known")
        values = random_hadamard(layout.heads.size, options.seed + 1)
    named = (("residual stream", stream), ("value heads", values))
    notes = tuple(f"{name}: {rotation.note}" for name, rotation in named if rotation and rotation.note)
    return replace(turned(layout, stream, values), notes=notes)


def turned(layout: Layout, stream: Rotation | None, values: Rotation | None) -> Rewriting:
    """The model whose residual stream, and whose values in every head, are turned; None for one that stays."""
    changes: dict[str, Change] = {}
    ones = [] if stream is None else _turn_stream(layout, Turn(stream), changes)
    if values is not None and layout.heads is not None:
        _turn_heads(layout, layout.heads, values, changes)
    rewritten = layout if stream is None else _untied(layout)
    tensors: dict[str, Callable[[Load], Tensor]] = {}
    for norm in ones:
        tensors[f"{norm.name}.weight"] = partial(_ones, norm, layout.norm_offset)
    for name, change in changes.items():
        module = rewritten.by_name[name]
        tensors[f"{name}.weight"] = partial(change.weight, transposed=module.transposed)
        if "bias" in module.tensors and change.rows:
            tensors[f"{name}.bias"] = change.bias
    config = {"tie_word_embeddings": False} if layout.tied and not rewritten.tied else {}
    return Rewriting(rewritten, tensors, config)


def require_free_stream(layout: Layout, advice: str) -> None:
    """Raise PlanError, ending with `advice`, if a rotation of the residual stream would change the function."""
    if not layout.residual:
        raise PlanError(f"rotation: what reads and writes the residual stream of {layout.model_type} is not known")
    if reason := layout.residual[0].fixed:
        raise PlanError(f"the residual stream of {layout.model_type} cannot be rotated: {reason}; {advice}")


def _turn_stream(layout: Layout, turn: Turn, changes: dict[str, Change]) -> list[ModuleSpec]:
    """Note what changes when the stream turns; returns the norms that were folded away."""
    embedding, head = layout.embedding.name, layout.head.name
    last = next(module for module in layout.modules if module.block is None and module.kind == "norm")
    folded = [last]
    reads = partial(Change, offset=layout.norm_offset, columns=(turn,))
    changes[embedding] = Change(embedding, columns=(turn,))
    changes[head] = reads(embedding if layout.tied else head, norm=f"{last.name}.weight")
    for index, residual in enumerate(layout.residual):
        block = layout.block_name(index)
        for norm, readers in residual.readers.items():
            folded.append(layout.by_name[f"{block}.{norm}"])
            for name in (f"{block}.{reader}" for reader in readers):
                changes[name] = reads(name, norm=f"{block}.{norm}.weight")
        for name in (f"{block}.{writer}" for writer in residual.writers):
            changes[name] = Change(name, rows=(turn,))
    return folded


def _turn_heads(layout: Layout, heads: ValueHeads, rotation: Rotation, changes: dict[str, Change]) -> None:
    """Note what changes when the values turn, in every block by the same matrix."""
    for index in range(layout.blocks):
        value, output = (f"{layout.block_name(index)}.{name}" for name in (heads.value, heads.output))
        readers = layout.by_name[output].shape[1] // heads.size
        rows = Turn(rotation, heads.count, heads.first, heads.stride)
        columns = Turn(rotation, readers, 0, heads.size)
        changes[value] = replace(changes.get(value, Change(value)), rows=(rows,))
        changes[output] = replace(changes.get(output, Change(output)), columns=(columns,))


def _untied(layout: Layout) -> Layout:
    """The layout with a head that has a weight of its own."""
    if not layout.tied:
        return layout
    own = replace(layout.head, tensors={"weight": layout.embedding.shape})
    modules = tuple(own if module.kind == "head" else module for module in layout.modules)
    return replace(layout, modules=modules, tied=False)


def _ones(norm: ModuleSpec, offset: float, load: Load) -> Tensor:
    """The weight of a norm that multiplies by one."""
    return torch.full(norm.tensors["weight"], 1 - offset, dtype=torch.float32)
