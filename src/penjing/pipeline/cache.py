"""A checkpoint that remembers what was read last: a block's tensors are wanted several times while it is worked on."""

from __future__ import annotations

from torch import Tensor

from penjing.checkpoint.base import Checkpoint
from penjing.errors import CheckpointError
from penjing.numerics.finite import all_finite


class BlockCache:
    """Loads tensors once until `clear` is called. Callers must not write into what they get."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._tensors: dict[str, Tensor] = {}

    def load(self, name: str) -> Tensor:
        """One tensor, from memory if it was read since the last `clear`. Raises CheckpointError if it is not finite."""
        if name not in self._tensors:
            tensor = self._checkpoint.load(name)
            if not all_finite(tensor):
                raise CheckpointError(f"{name} of {self._checkpoint.label} contains NaN or infinite values")
            self._tensors[name] = tensor
        return self._tensors[name]

    def clear(self) -> None:
        """Forget everything."""
        self._tensors.clear()
