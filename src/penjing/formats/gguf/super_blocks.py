"""K-quants: codes and two-level scales as the bytes of super-blocks of 256, and back; nothing is rounded.

With d and e the 16-bit numbers of the super-block (e as the file has it, which takes minima off), a and b the codes of
scales and minima:

    q2_k   16 bytes a + 16 b, pairs of bits (64), d, e
    q3_k   third bits (32), pairs of bits (64), 6-bit scales + 32 in 12 bytes, d
    q4_k   d, e, 6-bit scales and minima in 12 bytes, nibbles (128)
    q5_k   d, e, 6-bit scales and minima in 12 bytes, fifth bits (32), nibbles (128)
    q6_k   nibbles (128), pairs of bits (64), scales as int8 (16), d

Pairs of bits: byte p of each half holds the codes p, 32 + p, 64 + p, 96 + p of 128. Third and fifth bits: bit i of byte
p belongs to code 32 i + p. Nibbles: q4_k and q5_k pair up the groups of 32, q6_k the 64 weights of each quarter.

(Source: ggml's `ggml-common.h`, and the readers of the gguf package.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penjing.formats.gguf.blocks import from_halves, from_nibbles, halves, nibbles
from penjing.numerics.grids import IntegerGrid
from penjing.numerics.scale_codes import ScaleCodes
from penjing.representations import Quantized

_SIZES = {2: 84, 3: 110, 4: 144, 5: 176, 6: 210}


def pairs(codes: Tensor) -> Tensor:
    """Two bits each, uint8 (..., 256) -> (..., 64)."""
    parts = codes.unflatten(-1, (2, 4, 32))
    packed = parts[..., 0, :] | parts[..., 1, :] << 2 | parts[..., 2, :] << 4 | parts[..., 3, :] << 6
    return packed.flatten(-2)


def from_pairs(data: Tensor) -> Tensor:
    """The inverse of `pairs`."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8).unsqueeze(1)
    return (data.unflatten(-1, (2, 1, 32)) >> shifts & 3).flatten(-3)


def planes(codes: Tensor) -> Tensor:
    """One bit each, uint8 (..., 256) -> (..., 32)."""
    weights = 2 ** torch.arange(8).unsqueeze(1)
    return (codes.unflatten(-1, (8, 32)).long() * weights).sum(-2).to(torch.uint8)


def from_planes(data: Tensor) -> Tensor:
    """The inverse of `planes`."""
    return (data.unsqueeze(-2) >> torch.arange(8, dtype=torch.uint8).unsqueeze(1) & 1).flatten(-2)


def _nibbles(codes: Tensor, width: int) -> Tensor:
    """Nibbles of two neighbouring runs of `width`: uint8 (..., 256) -> (..., 128)."""
    return nibbles(codes.unflatten(-1, (-1, 2 * width))).flatten(-2)


def _from_nibbles(data: Tensor, width: int) -> Tensor:
    return from_nibbles(data.unflatten(-1, (-1, width))).flatten(-2)


def six_bit_pairs(scales: Tensor, minima: Tensor) -> Tensor:
    """Eight scales and eight minima below 64, uint8 (..., 8) -> (..., 12)."""
    first, last = scales.chunk(2, -1)
    low, high = minima.chunk(2, -1)
    return torch.cat([first | last >> 4 << 6, low | high >> 4 << 6, last & 15 | (high & 15) << 4], -1)


def from_six_bit_pairs(data: Tensor) -> tuple[Tensor, Tensor]:
    """The inverse of `six_bit_pairs`."""
    first, low, rest = data.split(4, -1)
    scales = torch.cat([first & 63, rest & 15 | first >> 6 << 4], -1)
    return scales, torch.cat([low & 63, rest >> 4 | low >> 6 << 4], -1)


def six_bits(scales: Tensor) -> Tensor:
    """Sixteen numbers below 64, uint8 (..., 16) -> (..., 12)."""
    high = (scales >> 4).unflatten(-1, (4, 4))
    top = high[..., 0, :] | high[..., 1, :] << 2 | high[..., 2, :] << 4 | high[..., 3, :] << 6
    return torch.cat([nibbles(scales & 15), top], -1)


def from_six_bits(data: Tensor) -> Tensor:
    """The inverse of `six_bits`."""
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8).unsqueeze(1)
    high = (data[..., 8:].unsqueeze(-2) >> shifts & 3).flatten(-2)
    return from_nibbles(data[..., :8]) | high << 4


@dataclass(frozen=True)
class SuperBlocks:
    """q2_k to q6_k."""

    grid: IntegerGrid
    width: int = 256

    @property
    def size(self) -> int:
        """Bytes per super-block."""
        return _SIZES[self.grid.bits]

    def write(self, weight: Quantized) -> Tensor:
        """Everything in the order of the type."""
        grid, coded, minima = self.grid, weight.scale_codes, weight.zero_codes
        assert coded is not None
        codes = (weight.codes - grid.low).to(torch.uint8).unflatten(1, (-1, self.width))
        scales, d = coded.codes.unflatten(1, (-1, grid.groups_per_block)), halves(coded.shared)
        if minima is None:
            if grid.bits == 3:
                packed = six_bits((scales + 32).to(torch.uint8))
                return torch.cat([planes(codes >> 2), pairs(codes & 3), packed, d], -1).flatten(1)
            parts = [_nibbles(codes & 15, 64), pairs(codes >> 4), scales.contiguous().view(torch.uint8), d]
            return torch.cat(parts, -1).flatten(1)
        a, b = scales.to(torch.uint8), minima.codes.to(torch.uint8).unflatten(1, (-1, grid.groups_per_block))
        ends = [d, halves(-minima.shared)]
        if grid.bits == 2:
            return torch.cat([a | b << 4, pairs(codes), *ends], -1).flatten(1)
        high = [planes(codes >> 4)] if grid.bits == 5 else []
        return torch.cat([*ends, six_bit_pairs(a, b), *high, _nibbles(codes & 15, 32)], -1).flatten(1)

    def read(self, blocks: Tensor, columns: int) -> Quantized:
        """Codes (N, columns)."""
        data = blocks.unflatten(1, (-1, self.size))
        b = e = None
        if self.grid.bits == 2:
            packed, codes, d, e = data[..., :16], from_pairs(data[..., 16:80]), data[..., 80:82], data[..., 82:]
            a, b = packed & 15, packed >> 4
        elif self.grid.bits == 3:
            codes = from_pairs(data[..., 32:96]) | from_planes(data[..., :32]) << 2
            a, d = from_six_bits(data[..., 96:108]).to(torch.int8) - 32, data[..., 108:]
        elif self.grid.bits == 6:
            codes = _from_nibbles(data[..., :128], 64) | from_pairs(data[..., 128:192]) << 4
            a, d = data[..., 192:208].contiguous().view(torch.int8), data[..., 208:]
        else:
            d, e, (a, b) = data[..., :2], data[..., 2:4], from_six_bit_pairs(data[..., 4:16])
            codes = _from_nibbles(data[..., -128:], 32)
            if self.grid.bits == 5:
                codes = codes | from_planes(data[..., 16:48]) << 4
        whole = (codes.to(torch.int8) + self.grid.low).reshape(len(blocks), columns)
        scales = _coded(a, from_halves(d))
        zeros = None if b is None or e is None else _coded(b, -from_halves(e))
        zero = None if zeros is None else zeros.decode()
        return Quantized(whole, scales.decode(), zero, self.grid, None, scales, zeros)


def _coded(codes: Tensor, shared: Tensor) -> ScaleCodes:
    return ScaleCodes("whole", codes.to(torch.int8).flatten(1), shared)
