"""What a format on disk must answer. Formats pack codes; they never round."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from penjing.models.layout import ModuleSpec
from penjing.representations import Masked, Quantized, Representation, Scheme


class Format(Protocol):
    """One way to write a model."""

    name: str
    summary: str

    def problems(self, module: ModuleSpec, scheme: Scheme) -> list[str]:
        """Why this format cannot hold the module (with what would fit); empty if it can."""

    def conflicts(self, schemes: Mapping[ModuleSpec, Scheme]) -> list[str]:
        """Why this format cannot hold these schemes together, though each alone fits; empty if it can."""

    def nbytes(self, module: ModuleSpec, scheme: Scheme, dtype: torch.dtype) -> int:
        """Exact bytes of the module's tensors on disk, biases included.

        Unstructured sparsity is a fraction: there the true count of survivors may differ by a few weights.
        """

    def pack(self, module: ModuleSpec, scheme: Scheme, weight: Representation, dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors to write for the module's weight, by full name; FormatError if the weight is not of `scheme`."""

    def unpack(self, module: ModuleSpec, scheme: Scheme, load: Callable[[str], Tensor]) -> Representation:
        """The representation back from what `pack` wrote; `load` reads a stored tensor by full name."""

    def decode(self, weight: Representation, dtype: torch.dtype) -> Tensor:
        """The matrix (N, K) in `dtype`, bit for bit what an engine holds after loading what `pack` wrote."""

    def config(self, schemes: Mapping[ModuleSpec, Scheme], dtype: torch.dtype) -> dict[str, Any]:
        """Entries to merge into config.json (`quantization_config`).

        `schemes` lists every module of the model that has a weight; those that stay dense have `Scheme()`.
        """

    def schemes(self, config: dict[str, Any], modules: tuple[ModuleSpec, ...]) -> dict[str, Scheme]:
        """Module name -> scheme, read back from a written config.json."""


def other_bytes(module: ModuleSpec, dtype: torch.dtype) -> int:
    """Bytes of the parameters besides the weight, which every format stores in `dtype`."""
    return dtype.itemsize * sum(math.prod(shape) for key, shape in module.tensors.items() if key != "weight")


def plain_bytes(module: ModuleSpec, dtype: torch.dtype) -> int:
    """Bytes of all parameters as plain tensors in `dtype`."""
    return dtype.itemsize * module.parameters


def plain_weight(module: ModuleSpec, weight: Representation, dtype: torch.dtype) -> dict[str, Tensor]:
    """`<module>.weight` as a plain tensor, in the orientation of the checkpoint."""
    values = weight.dense().to(dtype)
    return {f"{module.name}.weight": (values.T if module.transposed else values).contiguous()}


def read_plain_weight(module: ModuleSpec, load: Callable[[str], Tensor]) -> Tensor:
    """The inverse of `plain_weight`: the stored values, (N, K)."""
    values = load(f"{module.name}.weight")
    return values.T.contiguous() if module.transposed else values


def codes_of(weight: Representation) -> Quantized | None:
    """The codes of a quantised weight, with removed weights at the code that decodes to zero; None without codes."""
    if isinstance(weight, Quantized):
        return weight
    if not isinstance(weight, Masked) or not isinstance(weight.values, Quantized):
        return None
    values = weight.values
    return replace(values, codes=torch.where(weight.kept, values.codes, zero_codes(values)))


def zero_codes(values: Quantized) -> Tensor:
    """The code that decodes to zero at each place of the matrix, (N, K) int8."""
    if values.zero_point is None:
        return torch.zeros_like(values.codes)
    if values.group_index is not None:
        return values.zero_point[:, values.group_index.long()]
    return values.grid.spread(values.zero_point, values.codes.shape[1])
