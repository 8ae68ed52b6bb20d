"""A model of which only config.json is at hand: enough to plan for, nothing to read."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from penjing.checkpoint.base import TensorSpec
from penjing.checkpoint.directory import read_config
from penjing.checkpoint.fingerprint import fingerprint
from penjing.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor


class ConfigOnly:
    """A `Checkpoint` without tensors."""

    def __init__(self, path: Path, *, trust_remote_code: bool = False) -> None:
        self.path = path
        self.label = path.resolve().name
        self.config = read_config(path, trust_remote_code)

    def specs(self) -> dict[str, TensorSpec]:
        """Nothing is stored."""
        return {}

    def load(self, name: str) -> Tensor:
        """Raises CheckpointError."""
        raise CheckpointError(f"{self.path} holds a config.json and no weights, so {name} cannot be read")

    def files(self) -> Iterator[tuple[str, bytes]]:
        """No files."""
        return iter(())

    def fingerprint(self) -> str:
        """Depends on the config."""
        return fingerprint({"config": self.config}, {})


def is_config_only(path: Path) -> bool:
    """A directory with config.json in which no file could be weights, whatever their format."""
    weights = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".index.json")
    return (path / "config.json").is_file() and not any(file.name.endswith(weights) for file in path.iterdir())
