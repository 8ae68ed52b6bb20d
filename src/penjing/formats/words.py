"""What GPTQ and AWQ checkpoints have in common: codes in 32-bit words, one grid for the linears of all blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from penjing.errors import FormatError
from penjing.formats.base import codes_of, plain_codes
from penjing.models.layout import ModuleSpec
from penjing.numerics.grids import IntegerGrid
from penjing.numerics.packing import pack_bits, unpack_bits
from penjing.representations import Representation, Scheme

WORD = 32


def middle(grid: IntegerGrid) -> int:
    """What is added to signed codes to store them; ternary ones lie around the middle of their two bits as well."""
    return int(2 ** (grid.bits - 1))


def to_words(values: Tensor, shift: int, bits: int) -> Tensor:
    """int8 (R, n) -> `values + shift`, below 2**bits, as a stream of bits per row: int32 (R, n * bits / 32).

    Bytes wrap around at 256, so that signed ones may be shifted as unsigned ones.
    """
    return pack_bits(values.view(torch.uint8) + shift, bits).view(torch.int32)


def from_words(words: Tensor, shift: int, bits: int, count: int) -> Tensor:
    """The inverse of `to_words`: int32 (R, w) -> int8 (R, count)."""
    unsigned = unpack_bits(words.contiguous().view(torch.uint8), bits, count)
    return unsigned.sub_(shift).view(torch.int8)


def load_all(
    module: ModuleSpec, shapes: Mapping[str, tuple[int, ...]], load: Callable[[str], Tensor]
) -> dict[str, Tensor]:
    """The module's tensors by local name. Raises FormatError where one has not the shape that config.json implies."""
    stored = {key: load(f"{module.name}.{key}") for key in shapes}
    for key, shape in shapes.items():
        if tuple(stored[key].shape) != shape:
            raise FormatError(
                f"{module.name}.{key} has shape {list(stored[key].shape)}, but config.json makes it {list(shape)}"
            )
    return stored


def decode(weight: Representation, dtype: torch.dtype) -> Tensor:
    """The matrix (N, K) as kernels compute it: scales in `dtype`, exact products rounded once."""
    quantized = codes_of(weight)
    if quantized is None:
        return weight.dense().to(dtype)
    return replace(quantized, scale=quantized.scale.to(dtype)).dense(dtype)


def problems(name: str, module: ModuleSpec, scheme: Scheme, widths: tuple[int, ...]) -> list[str]:
    """Why a linear of `scheme` has no place in format `name`, which knows codes of so many bits."""
    grid, where = scheme.grid, module.name
    if scheme.activations is not None:
        return [f"{where}: format {name} keeps inputs as they are; drop `activations`"]
    if grid is None:
        return []
    if not plain_codes(grid) or scheme.columns or scheme.outliers:
        return [
            f"{where}: format {name} holds integer codes with one scale and whole zero points only; use "
            "format native, or gguf for its types"
        ]
    if module.kind != "linear" or module.block is None or module.expert:
        return [f"{where}: format {name} holds linears of the blocks, but no experts; ignore it, or use format native"]
    found = []
    if grid.bits not in widths:
        listed = ", ".join(map(str, widths))
        found.append(f"{where}: format {name} has codes of {listed} bits, not {grid.bits}; use those, or format native")
    found += _group_problems(name, module, grid)
    for length, what in zip(module.shape, ("outputs", "inputs"), strict=True):
        if length * grid.bits % WORD and grid.bits in widths:
            found.append(f"{where}: {length} {what} of {grid.bits} bits do not fill 32-bit words; use format native")
    return found


def _group_problems(name: str, module: ModuleSpec, grid: IntegerGrid) -> list[str]:
    columns, size = module.shape[1], grid.group_size
    if size == "tensor":
        return [f"{module.name}: format {name} has scales per group or output; use `group_size: channel`"]
    if not isinstance(size, int) or columns % size == 0:
        return []
    fits = [width for width in range(8, columns + 1, 8) if columns % width == 0]
    fits.sort(key=lambda width: abs(math.log(width / size)))
    listed = ", ".join(map(str, sorted(fits[:3]))) + " do" if fits else "no group size does"
    return [f"group_size {size} does not divide the {columns} inputs of {module.name}; {listed}"]


def conflicts(name: str, schemes: Mapping[ModuleSpec, Scheme]) -> list[str]:
    """Why config.json cannot tell of these schemes: it has room for one width, group size and symmetry."""
    grids = {(grid.bits, grid.group_size, grid.symmetric): grid for grid in _grids(schemes).values()}
    if len(grids) < 2:
        return []
    listed = " and ".join(sorted(f"{grid.bits} bits {grid.label}" for grid in grids.values()))
    return [f"format {name} has one grid per model, not {listed}; use one, or format native or compressed-tensors"]


def one_grid(name: str, schemes: Mapping[ModuleSpec, Scheme]) -> IntegerGrid | None:
    """The grid that all quantised modules share; None when there are none. Raises FormatError when there are two."""
    if found := conflicts(name, schemes):
        raise FormatError("; ".join(found))
    return next(iter(_grids(schemes).values()), None)


def quantised(schemes: Mapping[ModuleSpec, Scheme]) -> list[ModuleSpec]:
    """The modules that are stored as codes."""
    return list(_grids(schemes))


def linears_of_blocks(modules: tuple[ModuleSpec, ...] | Mapping[ModuleSpec, Scheme]) -> list[ModuleSpec]:
    """The modules that these formats may quantise."""
    return [module for module in modules if module.kind == "linear" and module.block is not None]


def _grids(schemes: Mapping[ModuleSpec, Scheme]) -> dict[ModuleSpec, IntegerGrid]:
    return {module: scheme.grid for module, scheme in schemes.items() if isinstance(scheme.grid, IntegerGrid)}


def read_grid(config: Mapping[str, Any], bits: int, group_size: int, symmetric: bool) -> IntegerGrid:
    """The grid of a written config.json; scales have the dtype of the model, and -1 is a group of all inputs."""
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float16").removeprefix("torch.")
    size = None if group_size == -1 else group_size
    return IntegerGrid(bits, size, symmetric, scale_dtype=getattr(torch, dtype))
