"""Ternary weights: a scale times -1, 0 or +1, and five of them in a byte.

A group w of n weights with scale a is coded as t_i = sign(w_i) where |w_i| > a / 2, else 0. Two rules give the scale:

    absmean        a = mean |w|                                          BitNet b1.58
    least-squares  the a (and t) of the least sum_i (w_i - a t_i)^2      exact

For given t the best scale is the mean of |w_i| over the t_i that are not 0, and the best t for any scale keeps the
largest weights. So one sort answers it: with |w| falling, and S_k the sum of the first k,

    least over a, t of |w - a t|^2  =  |w|^2 - max_k S_k^2 / k            a = S_k / k

Worked example: w = [3, -1, 0.5, 2]. S = [3, 5, 6, 6.5], S_k^2 / k = [9, 12.5, 12, 10.6]: k = 2, a = 2.5 and
t = [1, 0, 0, 1], error 14.25 - 12.5 = 1.75. The mean of magnitudes, a = 1.625, gives t = [1, -1, 0, 1], error 2.67.

3^5 = 243 < 256, so that a byte holds 5 codes: 1.6 bits for each, where entropy allows log2(3) = 1.585.

Source: Ma et al. 2024, "The Era of 1-bit LLMs" (arXiv:2402.17764), eq. 1 to 3; Li et al. 2016, "Ternary Weight
Networks" (arXiv:1605.04711), whose threshold 0.7 mean |w| approximates the exact one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from penjing.numerics.grids import IntegerGrid, group_label

TernaryRule = Literal["absmean", "least-squares"]

TRITS = 5
"""Codes in a byte."""

_CHUNK = 1 << 22
"""Codes handled at once."""


@dataclass(frozen=True)
class TernaryGrid(IntegerGrid):
    """The integer grid of -1, 0 and +1: symmetric, 2 bits per code in memory and 1.6 on disk.

    group_size   as in `IntegerGrid`
    rule         how a group's scale follows from its weights
    """

    bits: int = 2
    rule: TernaryRule = "least-squares"

    @property
    def label(self) -> str:
        """Group and name: "g128 ternary, 1.6 bits on disk"."""
        return f"{group_label(self.group_size)} ternary, 1.6 bits on disk"

    @property
    def low(self) -> int:
        return -1

    def code_bytes(self, count: int) -> int:
        """Bytes of `count` packed codes."""
        return -(-count // TRITS)

    def fit(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale, as stored, and zero point (always 0) of groups: `weight` (..., n) -> two fp32 tensors (...)."""
        magnitude = weight.float().abs()
        if self.rule == "absmean":
            scale = magnitude.mean(-1)
        else:
            sums = magnitude.sort(-1, descending=True).values.cumsum(-1)
            count = torch.arange(1, sums.shape[-1] + 1, dtype=torch.float32, device=sums.device)
            most = (sums.square() / count).argmax(-1, keepdim=True)
            scale = (sums.gather(-1, most) / (most + 1)).squeeze(-1)
        scale = self.storable(scale)
        return scale, torch.zeros_like(scale)


def pack_trits(codes: Tensor) -> Tensor:
    """Codes -1, 0, 1 of any shape -> uint8 (ceil(n / 5),): sum of (code + 1) 3^i, the first code lowest."""
    flat = (codes.reshape(-1) + 1).to(torch.uint8)
    packed = torch.empty(-(-len(flat) // TRITS), dtype=torch.uint8)
    powers = 3 ** torch.arange(TRITS, dtype=torch.int32)
    for start in range(0, len(flat), _CHUNK * TRITS):
        piece = flat[start : start + _CHUNK * TRITS]
        padded = torch.nn.functional.pad(piece, (0, -len(piece) % TRITS)).view(-1, TRITS)
        packed[start // TRITS : start // TRITS + len(padded)] = (padded * powers).sum(1).to(torch.uint8)
    return packed


def unpack_trits(packed: Tensor, count: int) -> Tensor:
    """The inverse of `pack_trits`: int8 (count,). Bytes above 242, which it never writes, give codes all the same."""
    every = torch.arange(256)
    table = torch.stack([every // 3**power % 3 - 1 for power in range(TRITS)], 1).to(torch.int8)
    return table[packed.int()].reshape(-1)[:count].contiguous()
