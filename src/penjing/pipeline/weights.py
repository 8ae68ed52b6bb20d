"""The weights of a checkpoint as an engine would see them, one module at a time, whatever format they lie in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penjing.checkpoint.base import Checkpoint
from penjing.formats import Format, format_of
from penjing.models.layout import Layout, ModuleSpec
from penjing.representations import Scheme


@dataclass(frozen=True)
class LiveModule:
    """What a module needs to run: its parameters, and bits per input value if an integer engine rounds its inputs."""

    tensors: dict[str, Tensor]
    activations: int | None = None


ModuleSource = Callable[[ModuleSpec, torch.dtype], LiveModule]
"""Where a running model gets its modules from."""


def decode_module(
    module: ModuleSpec, scheme: Scheme | None, target: Format, load: Callable[[str], Tensor], dtype: torch.dtype
) -> LiveModule:
    """A module from its stored tensors, in `dtype` and in the orientation of the live module.

    A module without a scheme is stored as plain tensors.
    """
    tensors = {}
    for key, name in zip(module.tensors, module.tensor_names(), strict=True):
        if key == "weight" and scheme is not None:
            decoded = target.decode(target.unpack(module, scheme, load), dtype)
            tensors[key] = decoded.T.contiguous() if module.transposed else decoded
        else:
            tensors[key] = load(name).to(dtype)
    return LiveModule(tensors, scheme.activations if scheme else None)


class Weights:
    """Modules of a checkpoint on disk. Nothing is kept: every call reads."""

    def __init__(self, checkpoint: Checkpoint, layout: Layout, load: Callable[[str], Tensor] | None = None) -> None:
        self._load = load or checkpoint.load
        self.format: Format = format_of(checkpoint.config)
        self.schemes: Mapping[str, Scheme] = self.format.schemes(checkpoint.config, layout.modules)

    def live(self, module: ModuleSpec, dtype: torch.dtype) -> LiveModule:
        """A module ready to run."""
        return decode_module(module, self.schemes.get(module.name), self.format, self._load, dtype)


def modules_outside_blocks(layout: Layout) -> tuple[Sequence[ModuleSpec], Sequence[ModuleSpec]]:
    """Modules before the first block (embeddings) and after the last (final norm, head)."""
    first = next(number for number, module in enumerate(layout.modules) if module.block is not None)
    before = [module for module in layout.modules[:first] if module.block is None]
    after = [module for module in layout.modules[first:] if module.block is None]
    return before, after
