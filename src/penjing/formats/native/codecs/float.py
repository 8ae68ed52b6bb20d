"""Codes on a grid of floats or quantiles.

    weight_codes         uint8: codes of the kept weights in row order, one bit stream (see `packing`)
    weight_scale         (N, G) plain scales; (1,) for one scale per matrix, (ceil(N / rows), G) for one per block
    weight_scale_codes   uint8, in the same shapes: scales coded in 8 bits (see `penjing.numerics.scale_codes`)
    weight_scale_shared  fp32: the numbers that coded scales share; absent for powers of two
    weight_group_index   int32 (K,): group of each column; absent when groups are consecutive

The last group of a row and the last block of a column may be shorter.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from penjing.formats.native.codecs.base import Parts, stream, stream_bytes
from penjing.numerics.float_grids import FloatGrid
from penjing.numerics.scale_codes import ScaleCodes, shared_numbers
from penjing.representations import Quantized


class FloatCodec:
    """`FloatGrid`, any group size, any order."""

    name = "float"
    grid = FloatGrid
    all_parts: tuple[str, ...] = ("codes", "scale", "scale_codes", "scale_shared", "group_index")

    def parts(self, grid: FloatGrid) -> tuple[str, ...]:
        """Codes and scales; a group index belongs to the scheme."""
        if grid.scale == "plain":
            return ("codes", "scale")
        return ("codes", "scale_codes") if grid.scale == "e8m0" else ("codes", "scale_codes", "scale_shared")

    def entry(self, grid: FloatGrid) -> dict[str, Any]:
        """Every field of the grid."""
        return {
            "element": grid.element,
            "group_size": grid.group_size or "channel",
            "scale": grid.scale,
            "scale_dtype": str(grid.scale_dtype).removeprefix("torch."),
            "rounding": grid.rounding,
            "tile_rows": grid.tile_rows,
        }

    def read_grid(self, entry: Mapping[str, Any]) -> FloatGrid:
        """The grid with these fields."""
        size = None if entry["group_size"] == "channel" else entry["group_size"]
        dtype = getattr(torch, entry["scale_dtype"])
        return FloatGrid(entry["element"], size, entry["scale"], dtype, entry["rounding"], entry["tile_rows"])

    def nbytes(self, shape: tuple[int, ...], grid: FloatGrid, kept: int) -> int:
        """Codes at their exact width, and scales."""
        return stream_bytes(kept, grid.bits) + grid.scale_bytes(shape)

    def write(self, weight: Quantized, kept: Tensor | None) -> dict[str, Tensor]:
        """The bit stream and the scales."""
        codes = weight.codes if kept is None else weight.codes[kept]
        parts = {"codes": stream(codes, weight.grid.bits)}
        coded = weight.scale_codes
        if coded is None:
            parts["scale"] = _once(weight.scale, weight)
        else:
            parts["scale_codes"] = _once(coded.codes, weight)
            parts |= {"scale_shared": coded.shared} if coded.shared.numel() else {}
        if weight.group_index is not None:
            parts["group_index"] = weight.group_index.int()
        return parts

    def read(self, parts: Parts, shape: tuple[int, int], grid: FloatGrid, kept: Tensor | None) -> Quantized:
        """Codes and scales in their own types."""
        rows, columns = shape
        height, groups = -(-rows // grid.tile_rows), grid.groups(columns)
        stored = (1,) if grid.group_size == "tensor" else (height, groups)
        coded = None
        if grid.scale == "plain":
            scale = parts.take("scale", *stored)
        else:
            shared = shared_numbers(grid.scale, grid.scale_count(shape))
            numbers = parts.take("scale_shared", shared) if shared else torch.empty(0)
            coded = ScaleCodes(grid.scale, parts.take("scale_codes", *stored).reshape(-1, groups), numbers)
            scale = coded.decode()
        if grid.group_size == "tensor":
            scale = scale.reshape(1, 1).expand(rows, 1).contiguous()
        scale = scale.repeat_interleave(grid.tile_rows, 0)[:rows]
        index = parts.take("group_index", columns) if "group_index" in parts.tensors else None
        codes = parts.codes("codes", grid.bits, rows * columns if kept is None else int(kept.sum()))
        if kept is not None:
            filled = torch.full(shape, grid.zero_code, dtype=torch.uint8)
            filled[kept] = codes
            codes = filled
        return Quantized(codes.reshape(shape), scale, None, grid, index, coded)


def _once(per_row: Tensor, weight: Quantized) -> Tensor:
    """Scales (N, G) without those that rows share."""
    if weight.grid.group_size == "tensor":
        return per_row[:1, 0].contiguous()
    rows = weight.grid.tile_rows if isinstance(weight.grid, FloatGrid) else 1
    return per_row[::rows].contiguous()


CODEC = FloatCodec()
