"""Canonical Huffman codes of bytes: frequent symbols take few bits, and nothing is lost.

Code lengths are the best ones of at most 12 bits (package-merge), so that a decoder needs one table of 4096 entries.
Codes follow from lengths alone: shorter ones first, then by symbol, each the one before plus one, shifted where they
grow longer. Symbols lie in blocks of 2048, each beginning with a byte of its own, so that blocks can be decoded side
by side. Bits are written from the highest of a byte to the lowest.

Worked example: a b a c a with lengths a 1, b 2, c 2 has the codes a 0, b 10, c 11: 0 10 0 11 0 = 7 bits, one byte.

Source: Huffman 1952; Larmore, Hirschberg 1990, "A fast algorithm for optimal length-limited Huffman codes".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

BLOCK = 2048
"""Symbols that are decoded one after the other."""

LONGEST = 12
"""Bits of the longest code."""

Words = NDArray[np.int64]


@dataclass(frozen=True)
class Huffman:
    """A coded sequence of bytes.

    stream   uint8: the blocks, one after the other
    sizes    int16: bytes of each block
    lengths  uint8 (256,): bits of the code of each symbol, 0 where it does not occur
    count    symbols
    """

    stream: Tensor
    sizes: Tensor
    lengths: Tensor
    count: int


def blocks_of(count: int) -> int:
    """Number of blocks that `count` symbols lie in."""
    return -(-count // BLOCK)


def code_lengths(counts: Tensor) -> Tensor:
    """Bits, uint8, that a code of least total length gives each symbol that occurs `counts` times; at most LONGEST."""
    present = counts.nonzero().flatten().tolist()
    lengths = torch.zeros(len(counts), dtype=torch.uint8)
    if len(present) < 2:
        lengths[present] = 1
        return lengths
    leaves: list[tuple[int, tuple[int, ...]]] = sorted((int(counts[symbol]), (symbol,)) for symbol in present)
    packages = leaves
    for _ in range(LONGEST - 1):
        pairs = [
            (left[0] + right[0], left[1] + right[1]) for left, right in zip(packages[::2], packages[1::2], strict=False)
        ]
        packages = sorted(leaves + pairs)
    for _, symbols in packages[: 2 * len(present) - 2]:
        for symbol in symbols:
            lengths[symbol] += 1
    return lengths


def expected_bits(frequencies: Tensor) -> float:
    """Mean bits of a symbol, when symbols are as frequent as `frequencies` (n,), of sum 1, says."""
    lengths = code_lengths((frequencies.double() * 2**40).long())
    return float(frequencies.double() @ lengths.double())


def canonical(lengths: Tensor) -> Words:
    """The code of each symbol, int64, in its lowest `lengths` bits."""
    codes, code, before = np.zeros(len(lengths), dtype=np.int64), 0, 0
    for length, symbol in sorted((int(length), symbol) for symbol, length in enumerate(lengths.tolist()) if length):
        code <<= length - before
        codes[symbol], before = code, length
        code += 1
    return codes


def encode(symbols: Tensor) -> Huffman:
    """Code a sequence of bytes, uint8 of any shape, in row order."""
    flat = symbols.reshape(-1)
    lengths = code_lengths(torch.bincount(flat, minlength=256))
    codes, bits = canonical(lengths), lengths.numpy().astype(np.int64)
    pieces, sizes = [], []
    for start in range(0, len(flat), BLOCK):
        block = flat[start : start + BLOCK].numpy()
        width, value = bits[block], codes[block]
        ends = width.cumsum()
        place = np.arange(ends[-1]) - np.repeat(ends - width, width)
        ones = np.repeat(value, width) >> (np.repeat(width, width) - 1 - place) & 1
        pieces.append(np.packbits(ones.astype(np.uint8)))
        sizes.append(len(pieces[-1]))
    stream = torch.from_numpy(np.concatenate(pieces)) if pieces else torch.empty(0, dtype=torch.uint8)
    return Huffman(stream, torch.tensor(sizes, dtype=torch.int16), lengths, len(flat))


def table(lengths: Tensor) -> NDArray[np.uint16]:
    """For every LONGEST bits that may come next: the symbol they begin with, and 256 times its length."""
    codes, entries = canonical(lengths), np.zeros(1 << LONGEST, dtype=np.uint16)
    for symbol, length in enumerate(lengths.tolist()):
        if length:
            first = codes[symbol] << (LONGEST - length)
            entries[first : first + (1 << (LONGEST - length))] = symbol | length << 8
    return entries


def decode(coded: Huffman) -> Tensor:
    """The inverse of `encode`: uint8 (count,). All blocks advance together, a symbol at a time.

    Raises ValueError for a stream that was not made by `encode`.
    """
    sizes = coded.sizes.numpy().astype(np.int64)
    entries = table(coded.lengths).astype(np.int64)
    padded = np.pad(coded.stream.numpy(), (0, 4)).astype(np.int64)
    place = (sizes.cumsum() - sizes) * 8
    ends = sizes.cumsum() * 8
    symbols = np.zeros((len(sizes), BLOCK), dtype=np.uint8)
    for step in range(min(BLOCK, coded.count)):
        lanes = len(sizes) if step < coded.count - (len(sizes) - 1) * BLOCK else len(sizes) - 1
        at = place[:lanes]
        byte = at >> 3
        word = padded[byte] << 16 | padded[byte + 1] << 8 | padded[byte + 2]
        entry = entries[word >> (24 - LONGEST - (at & 7)) & (1 << LONGEST) - 1]
        symbols[:lanes, step] = entry & 255
        place[:lanes] += entry >> 8
        if (entry < 256).any() or (place > ends).any():
            raise ValueError("the stream holds no code there, or ends too early")
    return torch.from_numpy(symbols.reshape(-1)[: coded.count])
