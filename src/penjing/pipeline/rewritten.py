"""A model with other tensors and the same function, as a view: each tensor is made when it is loaded.

What walks the model, verifies it or resumes needs to know nothing of it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from penjing.checkpoint.base import Checkpoint, TensorSpec
from penjing.methods.base import Rewriting


class RewrittenCheckpoint:
    """A `Checkpoint` whose tensors are the original's, save for those that `rewriting` makes.

    step  the recipe's words for it, which the fingerprint depends on
    """

    def __init__(self, original: Checkpoint, rewriting: Rewriting, step: str) -> None:
        self.path: Path = original.path
        self.label = original.label
        self.config: dict[str, Any] = original.config | dict(rewriting.config)
        self._original = original
        self._rewriting = rewriting
        self._step = step

    def specs(self) -> dict[str, TensorSpec]:
        """The original's tensors and those that are made, which are fp32."""
        specs = self._original.specs()
        for module in self._rewriting.layout.modules:
            for name, shape in zip(module.tensor_names(), module.tensors.values(), strict=True):
                if name in self._rewriting.tensors:
                    specs[name] = TensorSpec(shape, "float32", 4 * math.prod(shape))
        return specs

    def load(self, name: str) -> Tensor:
        """One tensor, computed from the original's if it is not one of them."""
        make = self._rewriting.tensors.get(name)
        return self._original.load(name) if make is None else make(self._original.load)

    def files(self) -> Iterator[tuple[str, bytes]]:
        """The original's tokenizer and other files."""
        return self._original.files()

    def fingerprint(self) -> str:
        """Depends on the original and on the step."""
        return hashlib.sha256(f"{self._original.fingerprint()} {self._step}".encode()).hexdigest()
