"""Bits without gaps: integers of 1 to 8 bits as one little-endian bit stream per row.

Code i of a row takes the bits `i * bits` to `(i + 1) * bits - 1` of the row's stream; bit b of the stream is bit
`b % 8` of byte `b // 8`. Read as little-endian 32-bit words, this is also the layout of compressed-tensors.

    >>> pack_bits(torch.tensor([[1, 2, 3]], dtype=torch.uint8), 2)     # 0b111001
    tensor([[57]], dtype=torch.uint8)
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 1 << 21
"""Codes handled at once: bounds the scratch memory to a few tens of MB whatever the size of a matrix."""


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return -(-count * bits // 8)


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes (R, n), uint8 below 2**bits -> bytes (R, ceil(n * bits / 8)), uint8. Spare bits are zero."""
    rows, count = codes.shape
    packed = torch.empty(rows, packed_bytes(count, bits), dtype=torch.uint8)
    word = _Word.of(bits)
    for row, start, stop in _pieces(rows, count):
        piece = codes[row, start:stop]
        padded = torch.nn.functional.pad(piece, (0, -piece.shape[1] % word.codes))
        lanes = padded.reshape(piece.shape[0], -1, word.codes).unbind(-1)
        words = functools.reduce(
            torch.bitwise_or, (lane.to(word.dtype) << bits * place for place, lane in enumerate(lanes))
        )
        stream = words.unsqueeze(-1).view(torch.uint8)[..., : word.bytes].reshape(piece.shape[0], -1)
        first = start * bits // 8
        packed[row, first : first + packed_bytes(stop - start, bits)] = stream[:, : packed_bytes(stop - start, bits)]
    return packed


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_bits`: bytes (R, at least ceil(count * bits / 8)) -> codes (R, count), uint8."""
    rows = packed.shape[0]
    codes = torch.empty(rows, count, dtype=torch.uint8)
    word = _Word.of(bits)
    for row, start, stop in _pieces(rows, count):
        first = start * bits // 8
        stream = packed[row, first : first + packed_bytes(stop - start, bits)]
        padded = torch.nn.functional.pad(stream, (0, -stream.shape[1] % word.bytes))
        grouped = padded.reshape(stream.shape[0], -1, word.bytes)
        words = torch.nn.functional.pad(grouped, (0, word.dtype.itemsize - word.bytes)).contiguous().view(word.dtype)
        lanes = torch.stack(
            [((words >> bits * place) & (2**bits - 1)).to(torch.uint8) for place in range(word.codes)], -1
        )
        codes[row, start:stop] = lanes.reshape(stream.shape[0], -1)[:, : stop - start]
    return codes


@dataclass(frozen=True)
class _Word:
    """The fewest whole bytes that hold whole codes, and the integer that is computed with."""

    bytes: int
    codes: int
    dtype: torch.dtype

    @classmethod
    def of(cls, bits: int) -> _Word:
        shared = math.gcd(bits, 8)
        size = bits // shared
        return cls(size, 8 // shared, torch.uint8 if size == 1 else torch.int32 if size <= 3 else torch.int64)


def _pieces(rows: int, count: int) -> list[tuple[slice, int, int]]:
    """Blocks of rows and columns of at most _CHUNK codes; columns start at a multiple of 8 codes, a whole byte."""
    height = max(1, _CHUNK // max(count, 1))
    return [
        (slice(row, row + height), start, min(start + _CHUNK, count))
        for row in range(0, rows, height)
        for start in range(0, count, _CHUNK)
    ]
