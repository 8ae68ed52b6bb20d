"""Layout of a decoder that has no family file: read off the model that transformers builds without weights.

Blocks are the longest list of equal modules, linears are found by type. Which module feeds which is not known, so
every linear is a group of its own and no scale can be folded anywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from penjing.errors import CheckpointError
from penjing.models.layout import InputGroup, Layout, ModuleKind, ModuleSpec

if TYPE_CHECKING:
    from torch import nn


def inferred_layout(config: Mapping[str, Any], *, trust_remote_code: bool = False) -> Layout:
    """Build the model on the meta device and describe it. Raises CheckpointError if it has no list of blocks."""
    from penjing.models.build import build_meta

    model = build_meta(config, trust_remote_code=trust_remote_code)
    model.tie_weights()
    path, blocks = _blocks(model)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    tied = head is not None and embedding is not None and head.weight is embedding.weight
    before, inside, after = [], [], []
    for name, module in model.named_modules():
        spec = _describe(name, module, path, kind=_kind(module, head, embedding), tied=tied)
        if spec is None:
            continue
        if spec.block is not None:
            inside.append(spec)
        elif spec.kind == "head" or (inside and spec.kind == "norm"):
            after.append(spec)
        else:
            before.append(spec)
    groups = tuple(
        tuple(
            InputGroup(None, (inner,), inner)
            for inner in (s.name.removeprefix(f"{path}.{i}.") for s in inside if s.block == i and s.kind == "linear")
        )
        for i in range(blocks)
    )
    return Layout(str(config["model_type"]), "inferred", (*before, *inside, *after), path, groups, tied, never={})


def _blocks(model: nn.Module) -> tuple[str, int]:
    """Path and length of the longest ModuleList whose modules are all of one class."""
    from torch import nn

    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(child) for child in module}) == 1
    }
    if not lists:
        raise CheckpointError(f"{type(model).__name__} has no list of equal blocks; only decoders can be compressed")
    path = max(lists, key=lambda name: (len(lists[name]), -name.count(".")))
    return path, len(lists[path])


def _kind(module: nn.Module, head: nn.Module | None, embedding: nn.Module | None) -> ModuleKind:
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if module is head:
        return "head"
    if module is embedding:
        return "embedding"
    if isinstance(module, nn.Linear | Conv1D):
        return "linear"
    return "norm" if "norm" in type(module).__name__.lower() else "other"


def _describe(name: str, module: nn.Module, path: str, *, kind: ModuleKind, tied: bool) -> ModuleSpec | None:
    """The module as a ModuleSpec; None if it stores nothing of its own."""
    from transformers.pytorch_utils import Conv1D

    stored = dict(module.named_parameters(recurse=False))
    kept = {key: buffer for key, buffer in module.named_buffers(recurse=False) if key in module.state_dict()}
    tensors = {key: tuple(tensor.shape) for key, tensor in (stored | kept).items()}
    if not tensors:
        return None
    index, _, rest = name.removeprefix(f"{path}.").partition(".")
    block = int(index) if name.startswith(f"{path}.") and rest else None
    if kind == "linear" and block is None:
        kind = "other"
    return ModuleSpec(name, kind, block, {} if tied and kind == "head" else tensors, isinstance(module, Conv1D))
