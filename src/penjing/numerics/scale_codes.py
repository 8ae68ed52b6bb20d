"""Scales that are themselves stored in 8 bits, and how each kind is coded.

    e8m0    a power of two, 2**(code - 127): the shared scale of MX formats (OCP Microscaling v1.0, section 5.4)
    e4m3    an FP8 number over one fp32 number of the matrix: s = e4m3(code) / global, global = 448 * 6 / max|w| (NVFP4)
    nested  double quantisation of QLoRA (Dettmers et al. 2023, arXiv:2305.14314, section 3): the mean of all scales is
            taken off, and the rest is quantised once more in blocks of 256, s = map[code] * block + offset, with the
            dynamic map of bitsandbytes (Dettmers et al. 2022, arXiv:2110.02861, section 2.2)
    whole   a whole number times one number per 256 inputs of a row (GGUF's K-quants, see `super_blocks`)

Powers of two are chosen by a named rule. With m = max|w| of the group and F the largest element (6 or 448), which is
1.5 or 1.75 times 2**f:

    floor   2**(floor(log2 m) - f)                    OCP: the largest weights of a group may be cut by up to a quarter
    round   as floor, one up if m / 2**floor(log2 m) >= 1.75      compressed-tensors
    ceil    2**ceil(log2(m / F))                      nothing is cut
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

ScaleRounding = Literal["floor", "round", "ceil"]
CodedScale = Literal["e8m0", "e4m3", "nested", "whole"]

BLOCK = 256
"""Scales that share one fp32 number when they are quantised once more."""
_BIAS = 127
_E4M3_MAX = 448.0


@dataclass(frozen=True)
class ScaleCodes:
    """The scales of a matrix as a file holds them.

    kind    how they are coded
    codes   uint8 (N, G): biased exponents, bit patterns of E4M3, or positions in `dynamic_map`; whole numbers are int8
    shared  fp32: (0,) for e8m0; (1,), the global scale, for e4m3; (1 + ceil(N * G / 256),), the offset followed by the
            scale of every block in row order, for nested; fp16 (N, S), what is multiplied, for whole
    """

    kind: CodedScale
    codes: Tensor
    shared: Tensor

    def decode(self) -> Tensor:
        """The scales, fp32 (N, G)."""
        if self.kind == "e8m0":
            return power_of_two(self.codes.int() - _BIAS)
        if self.kind == "e4m3":
            return self.codes.view(torch.float8_e4m3fn).float() / self.shared
        if self.kind == "whole":
            each = self.codes.shape[1] // self.shared.shape[1]
            return self.codes.float() * self.shared.float().repeat_interleave(each, 1)
        values = dynamic_map()[self.codes.int()].flatten()
        blocks = self.shared[1:].repeat_interleave(BLOCK)[: values.numel()]
        return (values * blocks + self.shared[0]).reshape(self.codes.shape)

    def nbytes(self) -> int:
        """Bytes of codes, one each, and shared numbers."""
        return self.codes.numel() + self.shared.element_size() * self.shared.numel()

    def rows(self, start: int, stop: int) -> ScaleCodes:
        """The same for outputs `start` to `stop` only; ValueError where that would cut a block of nested scales."""
        codes = self.codes[start:stop]
        if self.kind == "whole":
            return replace(self, codes=codes, shared=self.shared[start:stop])
        if self.kind != "nested" or len(codes) == len(self.codes):
            return replace(self, codes=codes)
        first = start * self.codes.shape[1]
        if first % BLOCK:
            raise ValueError("double-quantised scales are coded in blocks that run across rows; take the whole matrix")
        blocks = slice(1 + first // BLOCK, 1 + first // BLOCK + -(-codes.numel() // BLOCK))
        return replace(self, codes=codes, shared=torch.cat([self.shared[:1], self.shared[blocks]]))


def shared_numbers(kind: CodedScale, count: int) -> int:
    """How many fp32 numbers `count` scales of a matrix share."""
    return {"e8m0": 0, "whole": 0, "e4m3": 1, "nested": 1 + -(-count // BLOCK)}[kind]


def power_of_two(exponent: Tensor) -> Tensor:
    """2**exponent in fp32, exact from 2**-127 (a subnormal) to 2**127."""
    return torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)


def round_to_power_of_two(largest: Tensor, limit: float, rounding: ScaleRounding) -> Tensor:
    """The shared scale for groups whose largest magnitude is `largest`, when that of an element is `limit`; fp32.

    A group of zeros gets 1.
    """
    mantissa, exponent = torch.frexp(largest)  # 0.5 <= mantissa < 1, so that floor(log2) = exponent - 1
    power = exponent - 1 - math.floor(math.log2(limit))
    if rounding == "round":
        power = power + (mantissa >= 1.75 / 2).int()
    elif rounding == "ceil":
        mantissa, exponent = torch.frexp(largest / limit)
        power = exponent - (mantissa == 0.5).int()
    power = power.clamp(-_BIAS, _BIAS)
    return power_of_two(torch.where(largest == 0, torch.zeros_like(power), power))


def encode_e8m0(scale: Tensor) -> ScaleCodes:
    """Powers of two, fp32 (N, G), as biased exponents."""
    exponent = torch.frexp(scale).exponent - 1
    return ScaleCodes("e8m0", (exponent + _BIAS).to(torch.uint8), scale.new_empty(0))


def encode_e4m3(largest: Tensor, limit: float) -> ScaleCodes:
    """FP8 scales for groups with these largest magnitudes, fp32 (N, G), when that of an element is `limit`.

    No scale is 0: one that would vanish becomes the smallest FP8 number, and so no group can decode to NaN.
    """
    whole = _E4M3_MAX * limit / largest.max()
    shared = torch.nan_to_num(whole, nan=1.0, posinf=1.0).reshape(1)
    scale = (shared * (largest / limit)).clamp(max=_E4M3_MAX).to(torch.float8_e4m3fn)
    return ScaleCodes("e4m3", scale.view(torch.uint8).clamp(min=1), shared)


def encode_nested(scale: Tensor) -> ScaleCodes:
    """Quantise scales, fp32 (N, G), once more."""
    offset = scale.mean()
    flat = (scale - offset).flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).reshape(-1, BLOCK)
    largest = blocks.abs().amax(-1)
    relative = torch.where(largest.unsqueeze(1) == 0, 0, blocks / largest.unsqueeze(1)).flatten()[: flat.numel()]
    levels = dynamic_map()
    codes = torch.bucketize(relative, (levels[1:] + levels[:-1]) / 2, out_int32=True)
    return ScaleCodes("nested", codes.to(torch.uint8).reshape(scale.shape), torch.cat([offset.reshape(1), largest]))


@functools.cache
def dynamic_map() -> Tensor:
    """The 256 signed values of bitsandbytes' dynamic 8-bit type, fp32, ascending from -0.99297 to 1.

    Seven decades 10**-6 to 1; the decade 10**-d holds the midpoints of 2**(6 - d) equal parts of [0.1, 1] times it, and
    their negatives. With 0 and 1 that makes 256.
    """
    values = [0.0, 1.0]
    for parts in range(7):
        edges = torch.linspace(0.1, 1, 2**parts + 1, dtype=torch.float32)
        positive = (10 ** (parts - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        values += positive + [-value for value in positive]
    return torch.tensor(sorted(values), dtype=torch.float32)
