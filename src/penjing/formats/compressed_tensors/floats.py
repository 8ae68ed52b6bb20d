"""Floats of 8 and 4 bits.

    float-quantized        weight float8_e4m3fn (N, K); weight_scale in the dtype of the model: (N, 1), (1,), or
                           (ceil(N / 128), K / 128)
    mxfp8-quantized        weight float8_e4m3fn (N, K); weight_scale uint8 (N, K / 32), the exponents plus 127
    mxfp4-pack-quantized   weight_packed uint8 (N, K / 2), the first weight of a pair in the low half; weight_scale as
                           in mxfp8-quantized
    nvfp4-pack-quantized   weight_packed likewise; weight_scale float8_e4m3fn (N, K / 16); weight_global_scale fp32 (1,)

Engines decode float-quantized like integers: an E4M3 number times the scale in the dtype of the model, rounded once.
The other three are decoded in bf16 whatever that dtype is, NVFP4 by way of fp32 products.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from penjing.formats.compressed_tensors.layouts import Load, for_every_row, scale_once
from penjing.numerics.float_grids import FloatGrid
from penjing.numerics.packing import pack_bits, unpack_bits
from penjing.numerics.scale_codes import ScaleCodes
from penjing.representations import Quantized

_E4M3 = torch.float8_e4m3fn


class Fp8:
    """8-bit floats with plain scales."""

    name = "float-quantized"

    def nbytes(self, shape: tuple[int, ...], grid: FloatGrid) -> int:
        """A byte per weight, and the scales."""
        return shape[0] * shape[1] + grid.scale_bytes(shape)

    def write(self, weight: Quantized) -> dict[str, Tensor]:
        """Codes as numbers, each scale once."""
        scale = scale_once(weight.scale[:: _tile_rows(weight)], weight.grid.group_size == "tensor")
        return {"weight": weight.codes.view(_E4M3), "weight_scale": scale}

    def read(self, load: Load, shape: tuple[int, int], grid: FloatGrid) -> Quantized:
        """The inverse of `write`."""
        scale, rows = load("weight_scale"), shape[0]
        if grid.group_size == "tensor":
            scale = for_every_row(scale, rows)
        scale = scale.repeat_interleave(grid.tile_rows, 0)[:rows]
        return Quantized(load("weight").view(torch.uint8), scale, None, grid)

    def decode(self, weight: Quantized, dtype: torch.dtype) -> Tensor:
        """The exact product, rounded once."""
        return replace(weight, scale=weight.scale.to(dtype)).dense(dtype)


class CodedFloats:
    """Floats with scales of 8 bits."""

    def __init__(self, name: str, packed: bool) -> None:
        self.name = name
        self.packed = packed

    def nbytes(self, shape: tuple[int, ...], grid: FloatGrid) -> int:
        """Half a byte or a byte per weight, and the scales."""
        return shape[0] * shape[1] // (2 if self.packed else 1) + grid.scale_bytes(shape)

    def write(self, weight: Quantized) -> dict[str, Tensor]:
        """Codes, packed or as numbers, and what the scales are stored as."""
        coded = weight.scale_codes
        assert coded is not None
        tensors = {"weight_scale": coded.codes}
        if coded.kind == "e4m3":
            tensors = {"weight_scale": coded.codes.view(_E4M3), "weight_global_scale": coded.shared}
        if self.packed:
            return tensors | {"weight_packed": pack_bits(weight.codes, 4)}
        return tensors | {"weight": weight.codes.view(_E4M3)}

    def read(self, load: Load, shape: tuple[int, int], grid: FloatGrid) -> Quantized:
        """The inverse of `write`."""
        codes = unpack_bits(load("weight_packed"), 4, shape[1]) if self.packed else load("weight").view(torch.uint8)
        shared = load("weight_global_scale") if grid.scale == "e4m3" else torch.empty(0)
        assert grid.scale != "plain"
        coded = ScaleCodes(grid.scale, load("weight_scale").view(torch.uint8), shared)
        return Quantized(codes, coded.decode(), None, grid, scale_codes=coded)

    def decode(self, weight: Quantized, dtype: torch.dtype) -> Tensor:
        """Products in fp32, rounded to bf16."""
        return weight.dense().to(torch.bfloat16).to(dtype)


def _tile_rows(weight: Quantized) -> int:
    return weight.grid.tile_rows if isinstance(weight.grid, FloatGrid) else 1
