"""Codes on a binary-coded grid.

    weight_planes  uint8 (bits, ceil(n / 8)): the signs of the n kept weights in row order, one bit stream per plane,
                   1 = +1; bit b of a stream is bit b % 8 of byte b // 8
    weight_alpha   (N, G, bits)
    weight_offset  (N, G); absent on a grid without offsets
    weight_inputs  (K,): what each column is multiplied by; absent on a grid without
    weight_group_index  int32 (K,): group of each column; absent when groups are consecutive

Where rows are a multiple of 32 long and none was pruned, a row of a plane is a run of whole little-endian 32-bit words,
which the look-up kernel reads as they are, in blocks of rows (see `penjing.runtime.lut`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from penjing.formats.native.codecs.base import Parts, stream_bytes
from penjing.numerics.binary_coding import BinaryGrid
from penjing.numerics.packing import pack_bits, unpack_bits
from penjing.representations import BinaryCoded


class BinaryCodec:
    """`BinaryGrid`, any group size, with and without offsets."""

    name = "binary"
    grid = BinaryGrid
    all_parts: tuple[str, ...] = ("planes", "alpha", "offset", "inputs", "group_index")

    def parts(self, grid: BinaryGrid) -> tuple[str, ...]:
        """Planes and scales, offsets and values of inputs where the grid has them; a group index is the scheme's."""
        offset = () if grid.offset_dtype is None else ("offset",)
        return ("planes", "alpha", *offset, *(() if grid.inputs_dtype is None else ("inputs",)))

    def entry(self, grid: BinaryGrid) -> dict[str, Any]:
        """Every field of the grid; types only of what there is."""
        entry = {
            "bits": grid.bits,
            "group_size": grid.group_size or "channel",
            "scale_dtype": str(grid.scale_dtype).removeprefix("torch."),
        }
        for key in ("offset_dtype", "inputs_dtype"):
            if (dtype := getattr(grid, key)) is not None:
                entry[key] = str(dtype).removeprefix("torch.")
        return entry

    def read_grid(self, entry: Mapping[str, Any]) -> BinaryGrid:
        """The grid with these fields."""
        size = None if entry["group_size"] == "channel" else entry["group_size"]
        offset, inputs = (
            getattr(torch, entry[key]) if key in entry else None for key in ("offset_dtype", "inputs_dtype")
        )
        return BinaryGrid(entry["bits"], size, getattr(torch, entry["scale_dtype"]), offset, inputs)

    def nbytes(self, shape: tuple[int, ...], grid: BinaryGrid, kept: int) -> int:
        """A bit per kept weight and plane, each plane rounded up to a byte, and all scales."""
        rows, columns = shape
        groups = rows * grid.groups(columns)
        offsets = 0 if grid.offset_dtype is None else groups * grid.offset_dtype.itemsize
        inputs = 0 if grid.inputs_dtype is None else columns * grid.inputs_dtype.itemsize
        return grid.bits * (stream_bytes(kept, 1) + groups * grid.scale_dtype.itemsize) + offsets + inputs

    def write(self, weight: BinaryCoded, kept: Tensor | None) -> dict[str, Tensor]:
        """Planes and scales."""
        codes = (weight.codes if kept is None else weight.codes[kept]).reshape(1, -1)
        planes = [pack_bits(codes >> plane & 1, 1) for plane in range(weight.grid.bits)]
        parts = {"planes": torch.cat(planes), "alpha": weight.alpha.contiguous()}
        beside = {"offset": weight.offset, "inputs": weight.inputs, "group_index": weight.group_index}
        return parts | {part: tensor.contiguous() for part, tensor in beside.items() if tensor is not None}

    def read(self, parts: Parts, shape: tuple[int, int], grid: BinaryGrid, kept: Tensor | None) -> BinaryCoded:
        """Codes and scales in their own types. No code decodes to zero: where `kept` does not hold, codes are 0."""
        rows, columns = shape
        count = rows * columns if kept is None else int(kept.sum())
        groups = grid.groups(columns)
        planes = parts.take("planes", grid.bits, stream_bytes(count, 1))
        codes = torch.zeros(count, dtype=torch.uint8)
        for plane in range(grid.bits):
            codes |= unpack_bits(planes[plane : plane + 1], 1, count)[0] << plane
        if kept is not None:
            codes = torch.zeros(shape, dtype=torch.uint8).masked_scatter_(kept, codes)
        alpha = parts.take("alpha", rows, groups, grid.bits)
        offset = None if grid.offset_dtype is None else parts.take("offset", rows, groups)
        index = parts.take("group_index", columns) if "group_index" in parts.tensors else None
        inputs = None if grid.inputs_dtype is None else parts.take("inputs", columns)
        return BinaryCoded(codes.reshape(shape), alpha, offset, grid, index, inputs)


CODEC = BinaryCodec()
