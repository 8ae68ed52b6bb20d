"""How the weights of an ONNX model lie in its shards: as ONNX Runtime's operators take them. Nothing is copied.

Per weight (N outputs, K inputs), by name after the module's:

    blocks    weight_codes uint8 (N, G, block * bits / 8): codes + 2**(bits-1) of a block as one stream of bits, the
              last block filled up with the code of zero; weight_scale (N, G); and unless the grid is symmetric,
              weight_zero_point uint8 (N, ceil(G * bits / 8)). `MatMulNBits`; an embedding: `GatherBlockQuantized`
    integers  weight_codes int8 (K, N), weight_scale (N,): one scale per output. Products with inputs that are rounded
              to 8 bits: `MatMulIntegerToFloat`
    plain     weight, as in the checkpoint
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from penjing.errors import FormatError
from penjing.formats.base import plain_codes
from penjing.formats.words import middle
from penjing.models.layout import ModuleSpec
from penjing.numerics.grids import IntegerGrid
from penjing.numerics.packing import pack_bits, packed_bytes, unpack_bits
from penjing.representations import Quantized, Scheme

Load = Callable[[str], Tensor]
"""Reads a stored tensor of the module by its local name."""

BLOCK_SIZES = (16, 32, 64, 128, 256)
BLOCK_BITS = (2, 4, 8)
CODES, SCALE, ZERO = "weight_codes", "weight_scale", "weight_zero_point"


class WeightLayout(Protocol):
    """One way to store codes and scales."""

    def nbytes(self, shape: tuple[int, ...], grid: IntegerGrid) -> int:
        """Bytes of what `write` makes of a matrix (N, K)."""

    def write(self, weight: Quantized, grid: IntegerGrid) -> dict[str, Tensor]:
        """Tensors by local name."""

    def read(self, load: Load, shape: tuple[int, int], grid: IntegerGrid) -> Quantized:
        """The inverse of `write`."""


class Blocks:
    """Unsigned codes in blocks of consecutive inputs."""

    def nbytes(self, shape: tuple[int, ...], grid: IntegerGrid) -> int:
        """Whole blocks, a scale each, and zero points as a stream per row."""
        (rows, columns), block = shape, block_size(grid)
        groups = -(-columns // block)
        zeros = 0 if grid.symmetric else packed_bytes(groups, grid.bits)
        return rows * (groups * (block * grid.bits // 8 + grid.scale_dtype.itemsize) + zeros)

    def write(self, weight: Quantized, grid: IntegerGrid) -> dict[str, Tensor]:
        """See the module's docstring."""
        (rows, columns), block = weight.codes.shape, block_size(grid)
        spare = -columns % block
        codes = torch.nn.functional.pad(_unsigned(weight.codes, grid), (0, spare), value=middle(grid))
        tensors = {
            CODES: pack_bits(codes, grid.bits).reshape(rows, -1, block * grid.bits // 8),
            SCALE: weight.scale.contiguous(),
        }
        if weight.zero_point is not None:
            tensors[ZERO] = pack_bits(_unsigned(weight.zero_point, grid), grid.bits)
        return tensors

    def read(self, load: Load, shape: tuple[int, int], grid: IntegerGrid) -> Quantized:
        """Raises FormatError where a tensor has another shape than the config implies."""
        (rows, columns), block = shape, block_size(grid)
        groups = -(-columns // block)
        packed = _shaped(load, CODES, (rows, groups, block * grid.bits // 8))
        codes = _signed(unpack_bits(packed.reshape(rows, -1), grid.bits, columns), grid)
        scale, zero = _shaped(load, SCALE, (rows, groups)), None
        if not grid.symmetric:
            packed = _shaped(load, ZERO, (rows, packed_bytes(groups, grid.bits)))
            zero = _signed(unpack_bits(packed, grid.bits, groups), grid)
        return Quantized(codes, scale, zero, grid)


class Integers:
    """Codes as they are, with one scale per output."""

    def nbytes(self, shape: tuple[int, ...], grid: IntegerGrid) -> int:
        """A byte per weight and a scale per output."""
        rows, columns = shape
        return rows * (columns + grid.scale_dtype.itemsize)

    def write(self, weight: Quantized, grid: IntegerGrid) -> dict[str, Tensor]:
        """See the module's docstring."""
        return {CODES: weight.codes.T.contiguous(), SCALE: weight.scale[:, 0].contiguous()}

    def read(self, load: Load, shape: tuple[int, int], grid: IntegerGrid) -> Quantized:
        """Raises FormatError where a tensor has another shape than the config implies."""
        rows, columns = shape
        codes, scale = _shaped(load, CODES, (columns, rows)), _shaped(load, SCALE, (rows,))
        return Quantized(codes.T.contiguous(), scale.unsqueeze(1), None, grid)


BLOCKS, INTEGERS = Blocks(), Integers()


def layout_of(scheme: Scheme) -> WeightLayout | None:
    """How a weight of `scheme` is stored; None for plain tensors."""
    if not isinstance(scheme.grid, IntegerGrid):
        return None
    return BLOCKS if scheme.activations is None else INTEGERS


def block_size(grid: IntegerGrid) -> int:
    """Inputs of a block; the grid is one that `problems` has let pass."""
    assert isinstance(grid.group_size, int)
    return grid.group_size


def problems(module: ModuleSpec, scheme: Scheme) -> list[str]:
    """Why no operator of ONNX Runtime multiplies weights of this scheme, and what would fit."""
    grid, name = scheme.grid, module.name
    if grid is None:
        return [f"{name}: inputs are quantised only together with the weight"] if scheme.activations else []
    if not plain_codes(grid) or scheme.columns or scheme.outliers:
        return [
            f"{name}: ONNX Runtime multiplies integer codes with one scale and whole zero points only; use "
            "format native"
        ]
    if scheme.ordered:
        return [f"{name}: ONNX Runtime has no group index; order columns with static groups, or use format native"]
    if module.transposed:
        return [f"{name}: a Conv1D (GPT-2) has no place here; use format native"]
    return _integer_problems(module, scheme, grid) if scheme.activations else _block_problems(module, grid)


def _integer_problems(module: ModuleSpec, scheme: Scheme, grid: IntegerGrid) -> list[str]:
    how, name = scheme.activations, module.name
    assert how is not None
    if module.kind != "linear":
        return [f"{name}: only linears of the blocks have rounded inputs; drop `activations`"]
    if how.bits != 8 or how.kind != "int" or how.threshold is not None or (how.dynamic and not how.symmetric):
        return [f"{name}: ONNX Runtime multiplies 8-bit integer inputs, symmetric where they are dynamic; use those"]
    if how.dynamic and how.granularity != "token":
        return [f"{name}: dynamic inputs have a scale per token here; use `granularity: token`, or static ones"]
    if grid.bits != 8 or not grid.symmetric or grid.group_size is not None:
        return [f"{name}: rounded inputs go with 8-bit symmetric weights of `group_size: channel`; use those"]
    return []


def _block_problems(module: ModuleSpec, grid: IntegerGrid) -> list[str]:
    name, columns, size = module.name, module.shape[1], grid.group_size
    found = []
    if grid.bits not in BLOCK_BITS:
        found.append(f"{name}: ONNX Runtime multiplies codes of 2, 4 and 8 bits, not {grid.bits}; use format native")
    if size not in BLOCK_SIZES:
        whole = [size for size in BLOCK_SIZES if columns % size == 0] or [min(BLOCK_SIZES)]
        fits = ", ".join(map(str, whole))
        found.append(
            f"group_size {size or 'channel'} of {name}: ONNX Runtime has blocks of 16 to 256 inputs; use {fits}"
        )
    elif module.kind == "embedding" and columns % block_size(grid):
        whole = [size for size in BLOCK_SIZES if columns % size == 0]
        fits = f"use {', '.join(map(str, whole))}" if whole else "leave it dense"
        found.append(f"blocks of {grid.group_size} do not divide the {columns} columns of {name}; {fits}")
    return found


def _unsigned(codes: Tensor, grid: IntegerGrid) -> Tensor:
    return codes.view(torch.uint8) + middle(grid)  # bytes wrap around at 256


def _signed(codes: Tensor, grid: IntegerGrid) -> Tensor:
    return codes.sub(middle(grid)).view(torch.int8)


def _shaped(load: Load, key: str, shape: tuple[int, ...]) -> Tensor:
    tensor = load(key)
    if tuple(tensor.shape) != shape:
        raise FormatError(f"{key} has shape {list(tensor.shape)}, but config.json makes it {list(shape)}")
    return tensor
