"""Codes on an integer grid.

    weight_codes        uint8: codes + 2**(bits-1) of the kept weights in row order, one bit stream (see `packing`)
    weight_scale        (N, G), or (1,) for one scale per matrix
    weight_zero_point   uint8: zero points + 2**(bits-1) as a bit stream; of kind `float`, and minima: stored like
                        scales; absent when symmetric
    weight_group_index  int32 (K,): group of each column; absent when groups are consecutive

The last group of a row may be shorter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from penjing.formats.base import zero_codes
from penjing.formats.native.codecs.base import Parts, signed, stream, stream_bytes, unsigned
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Quantized


class IntegerCodec:
    """`IntegerGrid`, any group size, any order."""

    name = "integer"
    grid = IntegerGrid
    all_parts: tuple[str, ...] = ("codes", "scale", "zero_point", "group_index")

    def parts(self, grid: IntegerGrid) -> tuple[str, ...]:
        """Codes, scales, and zero points where the grid has them; a group index belongs to the scheme."""
        return ("codes", "scale") if grid.symmetric else ("codes", "scale", "zero_point")

    def entry(self, grid: IntegerGrid) -> dict[str, Any]:
        """Every field of the grid; `zero` only where zero points need not be whole numbers."""
        entry = {
            "bits": grid.bits,
            "group_size": grid.group_size or "channel",
            "symmetric": grid.symmetric,
            "scale_rule": grid.scale_rule,
            "scale_dtype": str(grid.scale_dtype).removeprefix("torch."),
        }
        return entry if grid.zero == "integer" else entry | {"zero": grid.zero}

    def read_grid(self, entry: Mapping[str, Any]) -> IntegerGrid:
        """The grid with these fields."""
        size = None if entry["group_size"] == "channel" else entry["group_size"]
        dtype, zero = getattr(torch, entry["scale_dtype"]), entry.get("zero", "integer")
        return IntegerGrid(entry["bits"], size, entry["symmetric"], entry["scale_rule"], dtype, zero)

    def nbytes(self, shape: tuple[int, ...], grid: IntegerGrid, kept: int) -> int:
        """Codes and whole zero points at their exact width."""
        scales = self._scales(shape, grid)
        scale_bytes = scales * grid.scale_dtype.itemsize
        zeros = scale_bytes if grid.zero != "integer" else stream_bytes(scales, grid.bits)
        return stream_bytes(kept, grid.bits) + scale_bytes + (0 if grid.symmetric else zeros)

    def write(self, weight: Quantized, kept: Tensor | None) -> dict[str, Tensor]:
        """Bit streams and scales."""
        grid, one = weight.grid, weight.grid.group_size == "tensor"
        codes = weight.codes if kept is None else weight.codes[kept]
        parts = {
            "codes": stream(unsigned(codes, grid.bits), grid.bits),
            "scale": (weight.scale[:1, 0] if one else weight.scale).contiguous(),
        }
        if weight.zero_point is not None:
            zero = (weight.zero_point[:1, 0] if one else weight.zero_point).contiguous()
            parts["zero_point"] = zero if zero.is_floating_point() else stream(unsigned(zero, grid.bits), grid.bits)
        if weight.group_index is not None:
            parts["group_index"] = weight.group_index.int()
        return parts

    def read(self, parts: Parts, shape: tuple[int, int], grid: IntegerGrid, kept: Tensor | None) -> Quantized:
        """Codes, scales and zero points in their own types."""
        rows, columns = shape
        scales = self._scales(shape, grid)
        one = grid.group_size == "tensor"
        scale = parts.take("scale", *((1,) if one else (rows, grid.groups(columns))))
        zero = None
        if not grid.symmetric and grid.zero != "integer":
            zero = parts.take("zero_point", *scale.shape)
        elif not grid.symmetric:
            zero = signed(parts.codes("zero_point", grid.bits, scales), grid.bits).reshape(scale.shape)
        if one:
            scale = scale.reshape(1, 1).expand(rows, 1).contiguous()
            zero = None if zero is None else zero.reshape(1, 1).expand(rows, 1).contiguous()
        index = parts.take("group_index", columns) if "group_index" in parts.tensors else None
        count = rows * columns if kept is None else int(kept.sum())
        codes = signed(parts.codes("codes", grid.bits, count), grid.bits)
        if kept is None:
            return Quantized(codes.reshape(shape), scale, zero, grid, index)
        blank = Quantized(torch.zeros(shape, dtype=torch.int8), scale, zero, grid, index)
        filled = zero_codes(blank).clone()
        filled[kept] = codes
        return Quantized(filled, scale, zero, grid, index)

    def _scales(self, shape: tuple[int, ...], grid: IntegerGrid) -> int:
        rows, columns = shape
        return 1 if grid.group_size == "tensor" else rows * grid.groups(columns)


CODEC = IntegerCodec()
