"""Writing a dense checkpoint block by block, and running it before it is complete."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from penjing.checkpoint import write_bytes, write_index, write_shard
from penjing.formats import FORMATS
from penjing.models.layout import Layout, ModuleSpec
from penjing.pipeline.weights import LiveModule, decode_module


class DenseWriter:
    """A Hugging Face directory of one shard for what lies outside the blocks (number 0) and one per block (from 1).

    Shards are written whole or not at all, so one that exists is complete.
    """

    def __init__(self, directory: Path, config: Mapping[str, Any], layout: Layout, dtype: torch.dtype) -> None:
        self._directory, self._config, self._layout, self._dtype = directory, dict(config), layout, dtype
        self._total = layout.blocks + 1

    def _path(self, number: int) -> Path:
        return self._directory / f"model-{number + 1:05d}-of-{self._total:05d}.safetensors"

    def write(self, number: int, make: Callable[[], Mapping[str, Tensor]]) -> None:
        """Write a shard of the tensors that `make` gives, by full name, unless it is there."""
        if self._is_whole(number):
            return
        tensors = {name: tensor.to(self._dtype).contiguous() for name, tensor in make().items()}
        write_shard(self._path(number), tensors)

    def _is_whole(self, number: int) -> bool:
        try:
            with safe_open(self._path(number), "pt"):
                return True
        except (OSError, SafetensorError):
            return False

    def live(self, module: ModuleSpec, dtype: torch.dtype) -> LiveModule:
        """A module from its shard, to run."""
        number = 0 if module.block is None else module.block + 1
        with safe_open(self._path(number), "pt") as shard:
            return decode_module(module, None, FORMATS["dense"], shard.get_tensor, dtype)

    def finish(self, files: Iterable[tuple[str, bytes]]) -> None:
        """Everything a model directory needs beside its shards; `files` are the tokenizer's and the like."""
        shards, total = {}, 0
        for number in range(self._total):
            with safe_open(self._path(number), "pt") as shard:
                shards[self._path(number).name] = sorted(shard.keys())
            total += self._layout.parameters
        write_index(self._directory, shards, self._layout.parameters * self._dtype.itemsize)
        config = {key: value for key, value in self._config.items() if key not in ("torch_dtype", "_name_or_path")}
        config["dtype"] = str(self._dtype).removeprefix("torch.")
        write_bytes(self._directory / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        for name, content in files:
            write_bytes(self._directory / name, content)
