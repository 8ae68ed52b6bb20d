"""Codes on a bilevel grid: N rows, K columns in G groups, R groups of rows.

    weight_codes             uint8: the codes in row order, one bit stream (see `packing`)
    weight_statistic_codes   uint8: codes of scales and zeros, (2, G, N) in row order, one bit stream
    weight_statistic_step    (2, G, R): what one step of those codes is worth
    weight_statistic_bottom  (2, G, R): the value of code 0
    weight_group_index       int32 (K,): group of each column; absent when groups are consecutive

The last group of a row may be shorter, and so may the last group of rows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from penjing.formats.native.codecs.base import Parts, stream, stream_bytes
from penjing.numerics.bilevel import BilevelGrid, Statistics
from penjing.representations import Bilevel


class BilevelCodec:
    """`BilevelGrid`, any order."""

    name = "bilevel"
    grid = BilevelGrid
    all_parts: tuple[str, ...] = ("codes", "statistic_codes", "statistic_step", "statistic_bottom", "group_index")

    def parts(self, grid: BilevelGrid) -> tuple[str, ...]:
        """Everything but the group index, which belongs to the scheme."""
        return self.all_parts[:-1]

    def entry(self, grid: BilevelGrid) -> dict[str, Any]:
        """Every field of the grid."""
        return {
            "bits": grid.bits,
            "group_size": grid.group_size,
            "statistic_bits": grid.statistic_bits,
            "statistic_group": grid.statistic_group,
            "scale_dtype": str(grid.scale_dtype).removeprefix("torch."),
        }

    def read_grid(self, entry: Mapping[str, Any]) -> BilevelGrid:
        """The grid with these fields."""
        sizes = {key: entry[key] for key in ("bits", "group_size", "statistic_bits", "statistic_group")}
        return BilevelGrid(**sizes, scale_dtype=getattr(torch, entry["scale_dtype"]))

    def nbytes(self, shape: tuple[int, ...], grid: BilevelGrid, kept: int) -> int:
        """Codes of weights and statistics at their exact width; every weight is stored, whatever `kept`."""
        rows, columns = shape
        groups = grid.groups(columns)
        statistics = stream_bytes(2 * rows * groups, grid.statistic_bits)
        second = 2 * 2 * groups * grid.row_groups(rows) * grid.scale_dtype.itemsize
        return stream_bytes(rows * columns, grid.bits) + statistics + second

    def write(self, weight: Bilevel, kept: Tensor | None) -> dict[str, Tensor]:
        """Bit streams and second-level numbers; a plan never pairs this grid with a mask."""
        parts = {
            "codes": stream(weight.codes, weight.grid.bits),
            "statistic_codes": stream(weight.statistics.codes, weight.grid.statistic_bits),
            "statistic_step": weight.statistics.step.contiguous(),
            "statistic_bottom": weight.statistics.bottom.contiguous(),
        }
        if weight.group_index is not None:
            parts["group_index"] = weight.group_index.int()
        return parts

    def read(self, parts: Parts, shape: tuple[int, int], grid: BilevelGrid, kept: Tensor | None) -> Bilevel:
        """Codes and statistics in their own types."""
        rows, columns = shape
        groups = grid.groups(columns)
        second = (2, groups, grid.row_groups(rows))
        step, bottom = parts.take("statistic_step", *second), parts.take("statistic_bottom", *second)
        coded = parts.codes("statistic_codes", grid.statistic_bits, 2 * groups * rows).reshape(2, groups, rows)
        index = parts.take("group_index", columns) if "group_index" in parts.tensors else None
        codes = parts.codes("codes", grid.bits, rows * columns).reshape(shape)
        return Bilevel(codes, Statistics(coded, step, bottom, grid.statistic_group), grid, index)


CODEC = BilevelCodec()
