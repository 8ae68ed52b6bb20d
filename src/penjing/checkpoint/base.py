"""What a source of weights offers, whether it lies in safetensors shards or in a GGUF file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TensorSpec:
    """A stored tensor, known from a header alone. `dtype` is a torch name ("bfloat16"); `nbytes` on disk."""

    shape: tuple[int, ...]
    dtype: str
    nbytes: int


class Checkpoint(Protocol):
    """A model on disk, read lazily: opening it reads headers only.

    path         directory or file it comes from
    label        how to call it in tables ("demo", the hub id, the directory's name)
    config       the contents of config.json (GGUF: made from its metadata)
    """

    path: Path
    label: str
    config: dict[str, Any]

    def specs(self) -> dict[str, TensorSpec]:
        """Every stored tensor by its Hugging Face name."""

    def load(self, name: str) -> Tensor:
        """One tensor as stored (GGUF: dequantised to fp32). Raises CheckpointError naming file and tensor."""

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Everything that is not a weight and belongs to the model: tokenizer, chat template, generation config."""

    def fingerprint(self) -> str:
        """Hex digest that changes when the model changes (config, headers, sizes, sampled contents)."""
