"""Codes on a ternary grid.

    weight_trits        uint8 (ceil(n / 5),): five codes in row order per byte (see `penjing.numerics.ternary`)
    weight_scale        (N, G), or (1,) for one scale per matrix
    weight_group_index  int32 (K,): group of each column; absent when groups are consecutive

Weights that were pruned before are zeros like others: the mask is part of the codes and takes no bit of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from penjing.formats.native.codecs.base import Parts
from penjing.numerics.ternary import TernaryGrid, pack_trits, unpack_trits
from penjing.representations import Quantized


class TernaryCodec:
    """`TernaryGrid`, any group size, any order."""

    name = "ternary"
    grid = TernaryGrid
    all_parts: tuple[str, ...] = ("trits", "scale", "group_index")

    def parts(self, grid: TernaryGrid) -> tuple[str, ...]:
        """Codes and scales; a group index belongs to the scheme."""
        return ("trits", "scale")

    def entry(self, grid: TernaryGrid) -> dict[str, Any]:
        """Group size, type of the scales, and the rule that gave them."""
        return {
            "group_size": grid.group_size or "channel",
            "scale_dtype": str(grid.scale_dtype).removeprefix("torch."),
            "rule": grid.rule,
        }

    def read_grid(self, entry: Mapping[str, Any]) -> TernaryGrid:
        """The grid with these fields."""
        size = None if entry["group_size"] == "channel" else entry["group_size"]
        return TernaryGrid(group_size=size, scale_dtype=getattr(torch, entry["scale_dtype"]), rule=entry["rule"])

    def nbytes(self, shape: tuple[int, ...], grid: TernaryGrid, kept: int) -> int:
        """Five codes per byte, and the scales."""
        return grid.code_bytes(kept) + self._scales(shape, grid) * grid.scale_dtype.itemsize

    def write(self, weight: Quantized, kept: Tensor | None) -> dict[str, Tensor]:
        """Codes and scales."""
        one = weight.grid.group_size == "tensor"
        parts = {
            "trits": pack_trits(weight.codes if kept is None else weight.codes[kept]),
            "scale": (weight.scale[:1, 0] if one else weight.scale).contiguous(),
        }
        return parts if weight.group_index is None else parts | {"group_index": weight.group_index.int()}

    def read(self, parts: Parts, shape: tuple[int, int], grid: TernaryGrid, kept: Tensor | None) -> Quantized:
        """Codes and scales in their own types."""
        rows, columns = shape
        count = rows * columns if kept is None else int(kept.sum())
        codes = unpack_trits(parts.take("trits", grid.code_bytes(count)), count)
        if kept is not None:
            codes = torch.zeros(shape, dtype=torch.int8).masked_scatter_(kept, codes)
        one = grid.group_size == "tensor"
        scale = parts.take("scale", *((1,) if one else (rows, grid.groups(columns))))
        scale = scale.reshape(1, 1).expand(rows, 1).contiguous() if one else scale
        index = parts.take("group_index", columns) if "group_index" in parts.tensors else None
        return Quantized(codes.reshape(shape), scale, None, grid, index)

    def _scales(self, shape: tuple[int, ...], grid: TernaryGrid) -> int:
        rows, columns = shape
        return 1 if grid.group_size == "tensor" else rows * grid.groups(columns)


CODEC = TernaryCodec()
