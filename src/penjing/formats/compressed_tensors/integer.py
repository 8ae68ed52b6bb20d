"""Integers of 2 to 8 bits.

    pack-quantized   weight_packed int32 (N, ceil(K * bits / 32)), codes + 2**(bits-1) as a bit stream without gaps per
                     row; weight_scale; weight_zero_point packed along the outputs; weight_shape int64 (2,)
    int-quantized    weight int8 (N, K); weight_scale; weight_zero_point int8. For 8-bit weights with integer inputs

Engines decode as `(code - zero) * scale` in the dtype the model is loaded in, with the scale cast to that dtype first.
The difference needs at most 8 bits and the product of it with a bf16 or fp16 scale fits in fp32, so the result is the
exact product rounded once.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from penjing.errors import FormatError
from penjing.formats.compressed_tensors.layouts import Load, for_every_row, scale_once
from penjing.formats.words import from_words, middle
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Quantized


class PackedIntegers:
    """Codes at their bit width."""

    name = "pack-quantized"

    def nbytes(self, shape: tuple[int, ...], grid: IntegerGrid) -> int:
        """Whole 32-bit words per row, and per group of zero points."""
        (rows, columns), bits = shape, grid.bits
        one = grid.group_size == "tensor"
        total = _scale_bytes(shape, grid) + rows * 4 * -(-columns * bits // 32) + 2 * 8
        if not grid.symmetric:
            total += 1 if one else 4 * -(-rows * bits // 32) * grid.groups(columns)
        return total

    def write(self, weight: Quantized) -> dict[str, Tensor]:
        """Packed by the library's own function."""
        from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

        bits, zero = weight.grid.bits, weight.zero_point
        one = weight.grid.group_size == "tensor"
        tensors = {
            "weight_scale": scale_once(weight.scale, one),
            "weight_packed": pack_to_int32(weight.codes, bits),
            "weight_shape": torch.tensor(weight.codes.shape),
        }
        if zero is not None:
            tensors["weight_zero_point"] = zero[:1, 0] if one else pack_to_int32(zero, bits, packed_dim=0)
        return tensors

    def read(self, load: Load, shape: tuple[int, int], grid: IntegerGrid) -> Quantized:
        """Raises FormatError when the stored shape is not `shape`."""
        rows, columns = shape
        stored = tuple(load("weight_shape").tolist())
        if stored != shape:
            raise FormatError(f"weight_shape is {stored}, but config.json makes it {shape}")
        codes = from_words(load("weight_packed"), middle(grid), grid.bits, columns)
        zero = None if grid.symmetric else load("weight_zero_point")
        if zero is not None and zero.dtype == torch.int32:
            zero = from_words(zero.T, middle(grid), grid.bits, rows).T.contiguous()
        return _quantized(codes, load("weight_scale"), zero, grid)

    def decode(self, weight: Quantized, dtype: torch.dtype) -> Tensor:
        """The exact product, rounded once."""
        return _decode(weight, dtype)


class Int8:
    """Codes as they are."""

    name = "int-quantized"

    def nbytes(self, shape: tuple[int, ...], grid: IntegerGrid) -> int:
        """A byte per weight and per zero point."""
        scale_bytes = _scale_bytes(shape, grid)
        zeros = 0 if grid.symmetric else scale_bytes // grid.scale_dtype.itemsize
        return shape[0] * shape[1] + scale_bytes + zeros

    def write(self, weight: Quantized) -> dict[str, Tensor]:
        """Codes, scales, zero points."""
        one = weight.grid.group_size == "tensor"
        tensors = {"weight_scale": scale_once(weight.scale, one), "weight": weight.codes}
        if weight.zero_point is not None:
            tensors["weight_zero_point"] = scale_once(weight.zero_point, one)
        return tensors

    def read(self, load: Load, shape: tuple[int, int], grid: IntegerGrid) -> Quantized:
        """The inverse of `write`."""
        zero = None if grid.symmetric else load("weight_zero_point")
        return _quantized(load("weight"), load("weight_scale"), zero, grid)

    def decode(self, weight: Quantized, dtype: torch.dtype) -> Tensor:
        """The exact product, rounded once."""
        return _decode(weight, dtype)


def _scale_bytes(shape: tuple[int, ...], grid: IntegerGrid) -> int:
    rows, columns = shape
    return grid.scale_dtype.itemsize * (1 if grid.group_size == "tensor" else rows * grid.groups(columns))


def _quantized(codes: Tensor, scale: Tensor, zero: Tensor | None, grid: IntegerGrid) -> Quantized:
    if grid.group_size == "tensor":
        scale = for_every_row(scale, len(codes))
        zero = None if zero is None else for_every_row(zero, len(codes))
    return Quantized(codes, scale, zero, grid)


def _decode(weight: Quantized, dtype: torch.dtype) -> Tensor:
    return replace(weight, scale=weight.scale.to(dtype)).dense(dtype)
