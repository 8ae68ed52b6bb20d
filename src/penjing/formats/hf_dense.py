"""Plain Hugging Face tensors: what every engine loads, and no smaller than the model was.

Any representation can be written this way as the values it stands for. That is fake quantisation: the quality is
that of the compressed model, the size is not. A recipe gets it only by saying `format: dense`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from penjing.formats.base import plain_bytes, plain_weight, read_plain_weight
from penjing.models.layout import ModuleSpec
from penjing.representations import Dense, Representation, Scheme


class DenseFormat:
    """The weight in the storage dtype under its usual name."""

    name = "dense"
    multiplies_integers = False
    summary = "plain Hugging Face tensors; loads everywhere, saves no bytes"

    def problems(self, module: ModuleSpec, scheme: Scheme) -> list[str]:
        """Values can always be written; only run-time activation quantisation has no place in plain tensors."""
        if scheme.activations is None:
            return []
        return [
            f"plain tensors cannot say that the inputs of {module.name} are quantised; "
            "use format compressed-tensors or native, or drop `activations`"
        ]

    def conflicts(self, schemes: Mapping[ModuleSpec, Scheme]) -> list[str]:
        """None: every module stands for itself."""
        return []

    def nbytes(self, module: ModuleSpec, scheme: Scheme, dtype: torch.dtype) -> int:
        """Elements times the size of the storage dtype."""
        return plain_bytes(module, dtype)

    def pack(self, module: ModuleSpec, scheme: Scheme, weight: Representation, dtype: torch.dtype) -> dict[str, Tensor]:
        """`<module>.weight` in `dtype`, transposed where the module stores it so."""
        return plain_weight(module, weight, dtype)

    def unpack(self, module: ModuleSpec, scheme: Scheme, load: Callable[[str], Tensor]) -> Representation:
        """The stored values, (N, K)."""
        return Dense(read_plain_weight(module, load))

    def decode(self, weight: Representation, dtype: torch.dtype) -> Tensor:
        """The matrix (N, K) in `dtype`, exactly as the loaded model will hold it."""
        return weight.dense().to(dtype)

    def config(self, schemes: Mapping[ModuleSpec, Scheme], dtype: torch.dtype) -> dict[str, Any]:
        """Nothing to declare."""
        return {}

    def schemes(self, config: dict[str, Any], modules: tuple[ModuleSpec, ...]) -> dict[str, Scheme]:
        """No module has a scheme."""
        return {}
