"""Codes that point into tables.

    weight_tables         (N, G, 2**bits), or (1, 1, 2**bits) for one table in all
    weight_codes          uint8: codes of the kept weights in row order, one bit stream (see `packing`); or, with
    Huffman, weight_codes_stream   uint8, weight_codes_sizes int16, weight_codes_lengths uint8 (256,)     (see
    `huffman`)

With Huffman the mask of removed weights, when there is one, is coded in the same way, a byte (8 weights) as a symbol:
`weight_mask_stream` and so on. The relative indices of Deep Compression need a filler wherever a gap is too wide;
bytes of the mask do not, and where one weight in ten is left they take as many bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from penjing.errors import FormatError
from penjing.formats.native.codecs.base import Parts, stream, stream_bytes
from penjing.numerics import huffman
from penjing.numerics.codebooks import CodebookGrid
from penjing.numerics.huffman import Huffman, blocks_of, expected_bits
from penjing.representations import Codebook
from penjing.runtime.huffman import decode

HUFFMAN_PARTS = ("stream", "sizes", "lengths")


def huffman_names(part: str) -> tuple[str, ...]:
    """The tensors that a Huffman-coded `part` consists of."""
    return tuple(f"{part}_{name}" for name in HUFFMAN_PARTS)


def huffman_parts(part: str, symbols: Tensor) -> dict[str, Tensor]:
    """Those tensors for a sequence of bytes."""
    coded = huffman.encode(symbols)
    return dict(zip(huffman_names(part), (coded.stream, coded.sizes, coded.lengths), strict=True))


def huffman_bytes(count: int, bits: float) -> int:
    """What `huffman_parts` takes for `count` symbols of `bits` bits in the mean."""
    return round(count * bits / 8 + blocks_of(count) * (2 + 0.5)) + 256


def read_huffman(parts: Parts, part: str, count: int) -> Tensor:
    """The inverse of `huffman_parts`, uint8 (count,); FormatError when the stream is damaged."""
    stream_name, sizes_name, lengths_name = huffman_names(part)
    sizes = parts.take(sizes_name, blocks_of(count))
    coded = Huffman(parts.take(stream_name, int(sizes.long().sum())), sizes, parts.take(lengths_name, 256), count)
    try:
        return decode(coded)
    except ValueError as error:
        raise FormatError(f"{parts.name}.weight_{stream_name}: {error}; the checkpoint is damaged") from error


@cache
def _bits(grid: CodebookGrid) -> float:
    return expected_bits(grid.frequencies())


class CodebookCodec:
    """`CodebookGrid`, tables per matrix, row or group."""

    name = "codebook"
    grid = CodebookGrid
    all_parts: tuple[str, ...] = ("tables", "codes", *huffman_names("codes"), *huffman_names("mask"))

    def parts(self, grid: CodebookGrid) -> tuple[str, ...]:
        """Tables and codes, the latter in one stream or Huffman-coded."""
        return ("tables", *(huffman_names("codes") if grid.huffman else ("codes",)))

    def entry(self, grid: CodebookGrid) -> dict[str, Any]:
        """Every field of the grid; `huffman` only where it is used."""
        entry = {
            "bits": grid.bits,
            "group_size": grid.group_size or "channel",
            "table_dtype": str(grid.table_dtype).removeprefix("torch."),
        }
        return entry | ({"huffman": True} if grid.huffman else {})

    def read_grid(self, entry: Mapping[str, Any]) -> CodebookGrid:
        """The grid with these fields."""
        size = None if entry["group_size"] == "channel" else entry["group_size"]
        return CodebookGrid(entry["bits"], size, getattr(torch, entry["table_dtype"]), entry.get("huffman", False))

    def nbytes(self, shape: tuple[int, ...], grid: CodebookGrid, kept: int) -> int:
        """Codes at their exact width and tables. With Huffman what is likely: how much it is, the weights decide."""
        rows, groups = grid.tables_of(shape)
        tables = rows * groups * grid.entries * grid.table_dtype.itemsize
        return tables + (huffman_bytes(kept, _bits(grid)) if grid.huffman else stream_bytes(kept, grid.bits))

    def write(self, weight: Codebook, kept: Tensor | None) -> dict[str, Tensor]:
        """Tables and codes."""
        codes = weight.codes if kept is None else weight.codes[kept]
        tables = {"tables": weight.tables.contiguous()}
        if weight.grid.huffman:
            return tables | huffman_parts("codes", codes)
        return tables | {"codes": stream(codes, weight.grid.bits)}

    def read(self, parts: Parts, shape: tuple[int, int], grid: CodebookGrid, kept: Tensor | None) -> Codebook:
        """Codes and tables in their own types; code 0 where `kept` does not hold."""
        count = shape[0] * shape[1] if kept is None else int(kept.sum())
        tables = parts.take("tables", *grid.tables_of(shape), grid.entries)
        codes = read_huffman(parts, "codes", count) if grid.huffman else parts.codes("codes", grid.bits, count)
        if kept is not None:
            codes = torch.zeros(shape, dtype=torch.uint8).masked_scatter_(kept, codes)
        return Codebook(codes.reshape(shape), tables, grid)


CODEC = CodebookCodec()
