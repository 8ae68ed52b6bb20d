"""A model with some of its blocks left out, as a view: nothing is copied, tensors are found under their old names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from penjing.checkpoint.base import Checkpoint, TensorSpec
from penjing.models.layout import Layout


class BlockSubset:
    """A `Checkpoint` of blocks `keep` (sorted indices of the full model), renumbered from 0."""

    def __init__(self, full: Checkpoint, layout: Layout, keep: Sequence[int]) -> None:
        self.path: Path = full.path
        self.label = full.label
        self._full = full
        self._keep = tuple(keep)
        self._old_name: dict[str, str] = {}
        prefixes = {f"{layout.block_name(old)}.": f"{layout.block_name(new)}." for new, old in enumerate(keep)}
        inside = f"{layout.block_path}."
        for name in full.specs():
            start = next((old for old in prefixes if name.startswith(old)), None)
            if start is not None:
                self._old_name[prefixes[start] + name.removeprefix(start)] = name
            elif not name.startswith(inside):
                self._old_name[name] = name
        self.config = _shorten(full.config, layout.blocks, keep)

    def specs(self) -> dict[str, TensorSpec]:
        """Tensors of the blocks that stay, by their new names."""
        specs = self._full.specs()
        return {new: specs[old] for new, old in self._old_name.items()}

    def load(self, name: str) -> Tensor:
        """One tensor, by its new name."""
        return self._full.load(self._old_name[name])

    def files(self) -> Iterator[tuple[str, bytes]]:
        """The full model's tokenizer and other files."""
        return self._full.files()

    def fingerprint(self) -> str:
        """Depends on the full model and on the blocks kept."""
        return hashlib.sha256(f"{self._full.fingerprint()} {self._keep}".encode()).hexdigest()


def _shorten(config: Mapping[str, Any], blocks: int, keep: Sequence[int]) -> dict[str, Any]:
    """The config for fewer blocks: the count, and every list with one entry per block."""
    config = dict(config)
    if "layer_types" not in config and (layer_types := _default_layer_types(config)):
        config["layer_types"] = layer_types
    for key, value in config.items():
        if key in ("num_hidden_layers", "n_layer", "num_layers"):
            config[key] = len(keep)
        elif isinstance(value, list) and len(value) == blocks:
            config[key] = [value[index] for index in keep]
    return config


def _default_layer_types(config: Mapping[str, Any]) -> list[str] | None:
    """Kinds of attention per block that the model class would derive from the block's number."""
    from transformers import AutoConfig

    model_type = config["model_type"]
    full = AutoConfig.for_model(model_type, **{key: value for key, value in config.items() if key != "model_type"})
    return getattr(full, "layer_types", None)
