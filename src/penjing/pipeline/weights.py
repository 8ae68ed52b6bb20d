"""The weights of a checkpoint as an engine would see them, one module at a time, whatever format they lie in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from penjing.checkpoint.base import Checkpoint
from penjing.formats import Format, declared_schemes, format_of
from penjing.formats.base import read_input_scale
from penjing.models.layout import Layout, ModuleSpec
from penjing.models.sharing import SCALE
from penjing.numerics.activations import InputScale
from penjing.representations import Activations, Representation, Scheme
from penjing.runtime import RoundInputs, runner_for


@dataclass(frozen=True)
class LiveModule:
    """What a module needs to run.

    tensors  its parameters
    attach   makes the module that holds them round its inputs, or multiply integers, as an engine does, and returns
             what undoes that; None where it runs as it is
    """

    tensors: dict[str, Tensor]
    attach: Callable[[nn.Module], Callable[[], object]] | None = None


ModuleSource = Callable[[ModuleSpec, torch.dtype], LiveModule]
"""Where a running model gets its modules from."""


def decode_module(
    module: ModuleSpec, scheme: Scheme | None, target: Format, load: Callable[[str], Tensor], dtype: torch.dtype
) -> LiveModule:
    """A module from its stored tensors, in `dtype` and in the orientation of the live module.

    A module without a scheme, or to which nothing was done, is stored as plain tensors.
    """
    scheme = None if scheme is None or scheme.dense else scheme
    tensors, weight = {}, None
    for key, name in zip(module.tensors, module.tensor_names(), strict=True):
        if key == "weight" and scheme is not None:
            weight = target.unpack(module, scheme, load)
            decoded = target.decode(weight, dtype)
            tensors[key] = decoded.T.contiguous() if module.transposed else decoded
        else:
            tensors[key] = load(name).to(dtype)
    how = scheme.activations if scheme else None
    if scheme is None or how is None:
        return LiveModule(tensors)
    static = read_input_scale(module, scheme, load)
    return LiveModule(tensors, partial(_attach, scheme, how, weight if target.multiplies_integers else None, static))


def _attach(
    scheme: Scheme, how: Activations, weight: Representation | None, static: InputScale | None, module: nn.Module
) -> Callable[[], object]:
    """Make `module` compute what an engine does with `weight`, or with the module's own when it is None."""
    runner = None if weight is None else runner_for(module, scheme, weight, static)
    if runner is not None:
        module.__dict__["forward"] = runner.forward
        return partial(module.__dict__.pop, "forward")
    return module.register_forward_pre_hook(RoundInputs(how, static)).remove


def borrowing_module(
    module: ModuleSpec, owner: LiveModule, load: Callable[[str], Tensor], dtype: torch.dtype
) -> LiveModule:
    """A module that computes with the weight of another one, `owner`: scaled, as if it had one itself."""
    own = {key: load(name).to(dtype) for key, name in zip(module.tensors, module.tensor_names(), strict=True)}
    weight, scale = owner.tensors["weight"], own.pop(SCALE, None)
    if scale is not None:
        weight = weight * (scale if module.transposed else scale.unsqueeze(1))
    return LiveModule({"weight": weight, **own})


class Weights:
    """Modules of a checkpoint on disk. Nothing is kept: every call reads."""

    def __init__(self, checkpoint: Checkpoint, layout: Layout, load: Callable[[str], Tensor] | None = None) -> None:
        self._load = load or checkpoint.load
        self._by_name = layout.by_name
        self.format: Format = format_of(checkpoint.config)
        self.schemes: Mapping[str, Scheme] = declared_schemes(checkpoint.config, layout.modules)

    def live(self, module: ModuleSpec, dtype: torch.dtype) -> LiveModule:
        """A module ready to run."""
        if module.owner:
            return borrowing_module(module, self.live(self._by_name[module.owner], dtype), self._load, dtype)
        return decode_module(module, self.schemes.get(module.name), self.format, self._load, dtype)


class ShardReader:
    """Tensors by name from the shards of a directory: shards as `WalkResult` lists them."""

    def __init__(self, directory: Path, shards: Mapping[str, Sequence[str]]) -> None:
        self._shard_of = {name: directory / shard for shard, names in shards.items() for name in names}

    def __call__(self, name: str) -> Tensor:
        with safe_open(self._shard_of[name], "pt") as shard:
            return shard.get_tensor(name)


def modules_outside_blocks(layout: Layout) -> tuple[Sequence[ModuleSpec], Sequence[ModuleSpec]]:
    """Modules before the first block (embeddings) and after the last (final norm, head)."""
    first = next(number for number, module in enumerate(layout.modules) if module.block is not None)
    before = [module for module in layout.modules[:first] if module.block is None]
    after = [module for module in layout.modules[first:] if module.block is None]
    return before, after
