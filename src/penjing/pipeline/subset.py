"""A model with some of its blocks left out, as a view: nothing is copied, tensors are found under their old names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import Tensor

from penjing.checkpoint.base import Checkpoint, TensorSpec
from penjing.models.layout import Layout
from penjing.models.shorter import shortened


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
        self.config = shortened(full.config, layout.blocks, keep)

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
