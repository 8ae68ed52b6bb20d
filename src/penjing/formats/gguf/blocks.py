"""Codes and scales as the bytes of GGUF's blocks of 32, and back; nothing is rounded.

With d a 16-bit float, m another, and q_0 ... q_31 the unsigned codes of a block:

    q4_0, iq4_nl   d, nibbles              nibble byte j: q_j in the low half, q_{j+16} in the high half
    q4_1           d, m, nibbles
    q5_0           d, fifth bits, nibbles  bit i of the 32-bit word is the high bit of q_i
    q5_1           d, m, fifth bits, nibbles
    q8_0           d, codes as int8
    mxfp4          biased exponent in one byte, nibbles
    tq2_0          pairs of bits, d        of 256; the byte p of each run of 32 holds q_p, q_{32+p}, q_{64+p}, q_{96+p}
    tq1_0          fives of trits, d       of 256; 32 bytes for 5 runs of 32 codes, 16 for 5 runs of 16, 4 for 4 of 4

Signed codes of symmetric grids are stored plus 2**(bits-1). A code c of tq2_0 is stored as 1 - c with -d: the file
counts from -1 to 2, two's complement from -2 to 1.

Five codes t_0 ... t_4 of tq1_0, counted from 0, are the number n = 81 t_0 + 27 t_1 + 9 t_2 + 3 t_3 + t_4, stored as
ceil(256 n / 243): t_0 is the whole part of byte / 256 * 3, and so on with what is left of it. Where four are stored,
t_4 is 0.

(Source: ggml's `ggml-common.h`, and the readers of the gguf package.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from penjing.numerics.float_grids import FloatGrid
from penjing.numerics.grids import IntegerGrid
from penjing.numerics.scale_codes import ScaleCodes
from penjing.numerics.ternary import TernaryGrid
from penjing.representations import Quantized


class Blocks(Protocol):
    """How the codes of one grid lie in blocks."""

    @property
    def width(self) -> int:
        """Weights per block."""

    @property
    def size(self) -> int:
        """Bytes per block."""

    def write(self, weight: Quantized) -> Tensor:
        """Codes (N, K) -> uint8 (N, K / width * size)."""

    def read(self, blocks: Tensor, columns: int) -> Quantized:
        """The inverse of `write`."""


def halves(values: Tensor) -> Tensor:
    """16-bit floats, any shape -> uint8 (..., 2)."""
    return values.to(torch.float16).contiguous().view(torch.uint8).reshape(*values.shape, 2)


def from_halves(data: Tensor) -> Tensor:
    """The inverse of `halves`."""
    return data.contiguous().view(torch.float16).reshape(data.shape[:-1])


def nibbles(codes: Tensor) -> Tensor:
    """Codes below 16, uint8 (..., n) -> (..., n / 2), the first half in the low nibbles."""
    low, high = codes.chunk(2, -1)
    return low | high << 4


def from_nibbles(data: Tensor) -> Tensor:
    """The inverse of `nibbles`."""
    return torch.cat([data & 15, data >> 4], -1)


def bit_planes(codes: Tensor) -> Tensor:
    """One bit each, uint8 (..., n) -> (..., n / 8), the first in the lowest bit."""
    weights = 2 ** torch.arange(8)
    return (codes.unflatten(-1, (-1, 8)).long() * weights).sum(-1).to(torch.uint8)


def from_bit_planes(data: Tensor) -> Tensor:
    """The inverse of `bit_planes`."""
    return (data.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1).flatten(-2)


def _by_block(rows: Tensor, width: int) -> Tensor:
    return rows.reshape(rows.shape[0], -1, width)


@dataclass(frozen=True)
class IntegerBlocks:
    """q4_0, q4_1, q5_0, q5_1, q8_0."""

    grid: IntegerGrid
    width: int = 32

    @property
    def size(self) -> int:
        """Bytes per block."""
        return (2 if self.grid.symmetric else 4) + self.width * self.grid.bits // 8

    def write(self, weight: Quantized) -> Tensor:
        """Scale, minimum, codes."""
        parts = [halves(weight.scale)]
        if weight.zero_point is not None:
            parts.append(halves(weight.zero_point))
        codes = _by_block(weight.codes, self.width)
        if self.grid.bits == 8:
            parts.append(codes.contiguous().view(torch.uint8))
        else:
            unsigned = (codes - self.grid.low).to(torch.uint8)
            if self.grid.bits == 5:
                parts.append(bit_planes(unsigned >> 4))
            parts.append(nibbles(unsigned & 15))
        return torch.cat(parts, -1).flatten(1)

    def read(self, blocks: Tensor, columns: int) -> Quantized:
        """Codes (N, columns)."""
        data = _by_block(blocks, self.size)
        scale, data = from_halves(data[..., :2]), data[..., 2:]
        minimum = None
        if not self.grid.symmetric:
            minimum, data = from_halves(data[..., :2]), data[..., 2:]
        if self.grid.bits == 8:
            codes = data.contiguous().view(torch.int8)
        else:
            high = torch.zeros((), dtype=torch.uint8)
            if self.grid.bits == 5:
                high, data = from_bit_planes(data[..., :4]) << 4, data[..., 4:]
            codes = (from_nibbles(data) | high).to(torch.int8) + self.grid.low
        return Quantized(codes.reshape(len(blocks), columns), scale, minimum, self.grid)


@dataclass(frozen=True)
class TableBlocks:
    """iq4_nl and mxfp4."""

    grid: FloatGrid
    width: int = 32

    @property
    def size(self) -> int:
        """Bytes per block."""
        return (1 if self.grid.scale == "e8m0" else 2) + self.width // 2

    def write(self, weight: Quantized) -> Tensor:
        """Scale, codes."""
        coded = weight.scale_codes
        scale = halves(weight.scale) if coded is None else coded.codes.unsqueeze(-1)
        return torch.cat([scale, nibbles(_by_block(weight.codes, self.width))], -1).flatten(1)

    def read(self, blocks: Tensor, columns: int) -> Quantized:
        """Codes (N, columns)."""
        data = _by_block(blocks, self.size)
        head = self.size - self.width // 2
        codes = from_nibbles(data[..., head:]).reshape(len(blocks), columns)
        if self.grid.scale != "e8m0":
            return Quantized(codes, from_halves(data[..., :2]), None, self.grid)
        coded = ScaleCodes("e8m0", data[..., 0].contiguous(), torch.empty(0))
        return Quantized(codes, coded.decode(), None, self.grid, scale_codes=coded)


@dataclass(frozen=True)
class TernaryBlocks:
    """tq2_0, all four codes of it."""

    grid: IntegerGrid
    width: int = 256
    size: int = 66

    def write(self, weight: Quantized) -> Tensor:
        """Codes, scale."""
        unsigned = (1 - _by_block(weight.codes, self.width)).to(torch.uint8).unflatten(-1, (2, 4, 32))
        packed = unsigned[..., 0, :] | unsigned[..., 1, :] << 2 | unsigned[..., 2, :] << 4 | unsigned[..., 3, :] << 6
        return torch.cat([packed.flatten(-2), halves(-weight.scale)], -1).flatten(1)

    def read(self, blocks: Tensor, columns: int) -> Quantized:
        """Codes (N, columns)."""
        data = _by_block(blocks, self.size)
        shifts = torch.arange(0, 8, 2, dtype=torch.uint8).unsqueeze(1)
        unsigned = data[..., :64].unflatten(-1, (2, 1, 32)) >> shifts & 3
        codes = (1 - unsigned.to(torch.int8)).reshape(len(blocks), columns)
        return Quantized(codes, -from_halves(data[..., 64:]), None, self.grid)


_TRIT_RUNS = ((5, 32), (5, 16), (4, 4))
"""Codes in a byte, and bytes, of each part of a block of tq1_0."""


@dataclass(frozen=True)
class TritBlocks:
    """tq1_0."""

    grid: TernaryGrid
    width: int = 256
    size: int = 54

    def write(self, weight: Quantized) -> Tensor:
        """Codes, scale."""
        trits = _by_block(weight.codes, self.width).int() + 1
        parts, start = list[Tensor](), 0
        for each, run in _TRIT_RUNS:
            powers = 3 ** torch.arange(4, 4 - each, -1).unsqueeze(1)
            number = (trits[..., start : start + each * run].unflatten(-1, (each, run)) * powers).sum(-2)
            parts.append(((number * 256 + 242) // 243).to(torch.uint8))
            start += each * run
        return torch.cat([*parts, halves(weight.scale)], -1).flatten(1)

    def read(self, blocks: Tensor, columns: int) -> Quantized:
        """Codes (N, columns); bytes that `write` never writes give codes all the same."""
        data = _by_block(blocks, self.size)
        parts, start = list[Tensor](), 0
        for each, run in _TRIT_RUNS:
            powers = 3 ** torch.arange(each).unsqueeze(1)
            left = data[..., start : start + run].int().unsqueeze(-2) * powers & 255
            parts.append((left * 3 >> 8).flatten(-2))
            start += run
        codes = (torch.cat(parts, -1) - 1).to(torch.int8).reshape(len(blocks), columns)
        return Quantized(codes, from_halves(data[..., start:]), None, self.grid)
