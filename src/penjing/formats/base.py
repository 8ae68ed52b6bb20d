"""What a format on disk must answer. Formats pack codes; they never round."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeGuard, runtime_checkable

import torch
from torch import Tensor

from penjing.checkpoint.base import Checkpoint
from penjing.models.layout import Layout, ModuleSpec
from penjing.numerics.activations import InputScale
from penjing.numerics.float_grids import FloatGrid
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Masked, Quantized, Representation, Scheme


class Format(Protocol):
    """One way to write a model."""

    name: str
    summary: str
    multiplies_integers: bool
    """Whether its loader multiplies codes where weights and inputs are integers, not the values they stand for."""

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


@dataclass(frozen=True)
class Finished:
    """A model of which every module is written: what a format that makes one file of it reads.

    directory  of the result
    layout     of the model as it was written
    schemes    by module name
    config     its config.json
    dtype      of the matrices that lie on no grid
    source     a model with the same tokenizer
    load       a written tensor by full name
    """

    directory: Path
    layout: Layout
    schemes: Mapping[str, Scheme]
    config: Mapping[str, Any]
    dtype: torch.dtype
    source: Checkpoint
    load: Callable[[str], Tensor]


@runtime_checkable
class OneFile(Protocol):
    """A format whose result is one file, put together from the shards when the walk is done."""

    vector_dtype: torch.dtype
    """Of every tensor of one dimension."""

    def refusals(self, layout: Layout, config: Mapping[str, Any]) -> list[str]:
        """Why this format cannot hold the model, whatever becomes of its weights; empty if it can."""

    def companion_problems(self, checkpoint: Checkpoint) -> list[str]:
        """What of the files beside the weights does not go into this format; empty if all does."""

    def assemble(self, finished: Finished) -> Path:
        """Write the file; returns its path. Raises FormatError."""


@runtime_checkable
class WithGraph(Protocol):
    """A format whose engine reads more than the shards: files that are written beside them when the walk is done."""

    def refusals(self, layout: Layout, config: Mapping[str, Any]) -> list[str]:
        """Why this format cannot hold a model, whatever becomes of its weights; empty if it can."""

    def write_beside(self, directory: Path, layout: Layout, config: Mapping[str, Any]) -> list[str]:
        """Write the files into `directory`, where shards and `config` already are; returns their names."""


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


def input_tensors(module: ModuleSpec, by: InputScale) -> dict[str, Tensor]:
    """What every format stores of a static input scale: `input_scale` fp32 (1,), `input_zero_point` int8 (1,)."""
    tensors = {"input_scale": by.scale.float(), "input_zero_point": by.zero}
    return {f"{module.name}.{part}": tensor for part, tensor in tensors.items() if tensor is not None}


def input_parts(scheme: Scheme) -> dict[str, torch.dtype]:
    """Names and dtypes of the tensors (1,) that a module needs for its inputs, after its name and a dot."""
    how = scheme.activations
    if how is None or how.dynamic:
        return {}
    return {"input_scale": torch.float32} | ({} if how.symmetric else {"input_zero_point": torch.int8})


def input_bytes(scheme: Scheme) -> int:
    """Bytes of `input_tensors`."""
    return sum(dtype.itemsize for dtype in input_parts(scheme).values())


def read_input_scale(module: ModuleSpec, scheme: Scheme, load: Callable[[str], Tensor]) -> InputScale | None:
    """The inverse of `input_tensors`; None where scales are dynamic."""
    parts = [load(f"{module.name}.{part}") for part in input_parts(scheme)]
    return InputScale(*parts) if parts else None


def plain_codes(grid: object) -> TypeGuard[IntegerGrid]:
    """Whether codes and scales on a grid are all there is to it: whole zero points, no minima, no scales in two levels
    (K-quants)."""
    return isinstance(grid, IntegerGrid) and grid.zero != "float" and not grid.offset and not grid.scale_bits


def codes_of(weight: Representation) -> Quantized | None:
    """The codes of a quantised weight, with removed weights at the code that decodes to zero; None without codes."""
    if isinstance(weight, Quantized):
        return weight
    if not isinstance(weight, Masked) or not isinstance(weight.values, Quantized):
        return None
    values = weight.values
    return replace(values, codes=torch.where(weight.kept, values.codes, zero_codes(values)))


def zero_codes(values: Quantized) -> Tensor:
    """The code that decodes to zero at each place of the matrix, (N, K) int8; with float zero points and minima, the
    closest."""
    if isinstance(values.grid, FloatGrid):
        return torch.full_like(values.codes, values.grid.zero_code)
    if values.zero_point is None:
        return torch.zeros_like(values.codes)
    zero = values.zero_point
    if values.grid.offset:
        zero = values.grid.encode(torch.zeros_like(zero), values.scale.float(), zero.float()).to(torch.int8)
    elif zero.is_floating_point():
        zero = zero.float().round().clamp(values.grid.low, values.grid.high).to(torch.int8)
    if values.group_index is not None:
        return zero[:, values.group_index.long()]
    return values.grid.spread(zero, values.codes.shape[1])
