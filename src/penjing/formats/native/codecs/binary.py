"""Codes on a binary-coded grid.

    weight_planes  uint8 (bits, ceil(n / 8)): the signs of the n kept weights in row order, one bit stream per plane,
                   1 = +1; bit b of a stream is bit b % 8 of byte b // 8
    weight_alpha   (N, G, bits)
    weight_offset  (N, G); absent on a grid without offsets

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
    all_parts: tuple[str, ...] = ("planes", "alpha", "offset")

    def parts(self, grid: BinaryGrid) -> tuple[str, ...]:
        """Planes and scales, and offsets where the grid has them."""
        return ("planes", "alpha") if grid.offset_dtype is None else ("planes", "alpha", "offset")

    def entry(self, grid: BinaryGrid) -> dict[str, Any]:
        """Every field of the grid; `offset_dtype` only where there are offsets."""
        entry = {
            "bits": grid.bits,
            "group_size": grid.group_size or "channel",
            "scale_dtype": str(grid.scale_dtype).removeprefix("torch."),
        }
        if grid.offset_dtype is not None:
            entry["offset_dtype"] = str(grid.offset_dtype).removeprefix("torch.")
        return entry

    def read_grid(self, entry: Mapping[str, Any]) -> BinaryGrid:
        """The grid with these fields."""
        size = None if entry["group_size"] == "channel" else entry["group_size"]
        offset = getattr(torch, entry["offset_dtype"]) if "offset_dtype" in entry else None
        return BinaryGrid(entry["bits"], size, getattr(torch, entry["scale_dtype"]), offset)

    def nbytes(self, shape: tuple[int, ...], grid: BinaryGrid, kept: int) -> int:
        """A bit per kept weight and plane, each plane rounded up to a byte, and the scales."""
        rows, columns = shape
        groups = rows * grid.groups(columns)
        offsets = 0 if grid.offset_dtype is None else groups * grid.offset_dtype.itemsize
        return grid.bits * (stream_bytes(kept, 1) + groups * grid.scale_dtype.itemsize) + offsets

    def write(self, weight: BinaryCoded, kept: Tensor | None) -> dict[str, Tensor]:
        """Planes and scales."""
        codes = (weight.codes if kept is None else weight.codes[kept]).reshape(1, -1)
        planes = [pack_bits(codes >> plane & 1, 1) for plane in range(weight.grid.bits)]
        parts = {"planes": torch.cat(planes), "alpha": weight.alpha.contiguous()}
        return parts if weight.offset is None else parts | {"offset": weight.offset.contiguous()}

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
        return BinaryCoded(codes.reshape(shape), alpha, offset, grid)


CODEC = BinaryCodec()
