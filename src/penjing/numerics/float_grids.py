"""Grids of a few floating-point numbers, or of quantiles: NF4, FP4, IQ4_NL, FP8, MXFP4, MXFP8, NVFP4.

A weight w in a group with scale s becomes the element nearest to w / s, beyond the largest one the largest; decoding
is one product, w_hat = s * element.

    nf4    16 quantiles of a normal distribution, scaled to [-1, 1] (QLoRA, arXiv:2305.14314, appendix E)
    fp4    the 4-bit float of bitsandbytes: 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1 and their negatives
    iq4_nl 16 whole numbers from -127 to 113, dense around zero, which is not among them (llama.cpp)
    e2m1   the 4-bit float of OCP: 0, 0.5, 1, 1.5, 2, 3, 4, 6 and their negatives
    e4m3   8-bit float up to 448 without infinities (arXiv:2209.05433); torch calls it float8_e4m3fn
    e5m2   8-bit float up to 57344

Codes are bit patterns, on nf4 and iq4_nl positions in the table. Ties go to the even bit pattern; on nf4, fp4 and
iq4_nl to the smaller value, as in bitsandbytes. A scale is max|w| / (largest element), stored as a plain number or in 8
bits (see `scale_codes`), and always rounded to what is stored before codes are computed:

    nf4, fp4        fp32, or quantised once more       groups of 64
    iq4_nl          fp16, any sign                     groups of 32; the largest weight becomes -127
    fp8             plain                              a row, the matrix, or a block of 128 x 128
    mxfp4, mxfp8    e8m0, a power of two               groups of 32
    nvfp4           e4m3 over one fp32 number          groups of 16

Worked example, e2m1 with power-of-two scales rounded down: a group with weights (0.7, -0.3, 0.1, 0) has m = 0.7, so
s = 2**(floor(log2 0.7) - 2) = 0.125; w / s = (5.6, -2.4, 0.8, 0) becomes (6, -2, 1, 0) and thus w_hat = (0.75, -0.25,
0.125, 0).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from penjing.numerics.grids import Grouped, IntegerGrid, group_label
from penjing.numerics.scale_codes import (
    CodedScale,
    ScaleCodes,
    ScaleRounding,
    encode_e4m3,
    encode_nested,
    round_to_power_of_two,
    shared_numbers,
)

Element = Literal["nf4", "fp4", "iq4_nl", "e2m1", "e4m3", "e5m2"]
ScaleKind = Literal["plain"] | CodedScale

_LARGEST: dict[Element, float] = {
    "nf4": 1.0,
    "fp4": 1.0,
    "iq4_nl": 127.0,
    "e2m1": 6.0,
    "e4m3": 448.0,
    "e5m2": 57344.0,
}
_FP8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635),
    *(-0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725),
    *(0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


_IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
_POSITIONS = ("nf4", "iq4_nl")
"""Elements whose codes are positions in an ascending table, not bit patterns."""


@dataclass(frozen=True)
class FloatGrid(Grouped):
    """Elements of one kind, times a scale per group along the last axis.

    element     what a code stands for
    group_size  as in `IntegerGrid`
    scale       how scales are stored
    scale_dtype of a plain scale; coded scales are fp32 in memory
    rounding    how a power of two is chosen; only where scales are e8m0
    tile_rows   outputs that share a scale; with 128 and a group size of 128, blocks of 128 x 128
    """

    element: Element = "nf4"
    group_size: int | Literal["tensor"] | None = 64
    scale: ScaleKind = "plain"
    scale_dtype: torch.dtype = torch.float32
    rounding: ScaleRounding = "round"
    tile_rows: int = 1

    @property
    def bits(self) -> int:
        return 8 if self.element in _FP8 else 4

    @property
    def symmetric(self) -> bool:
        """There are no zero points: zero is an element (on iq4_nl, 1 is as good as zero)."""
        return True

    @property
    def name(self) -> str:
        """What the field calls it: "nf4", "fp8 e4m3", "mxfp4", "nvfp4"."""
        if self.scale == "e8m0":
            return f"mxfp{self.bits}" + (" e5m2" if self.element == "e5m2" else "")
        if self.scale == "e4m3":
            return "nvfp4" if self.element == "e2m1" else f"{self.element} with e4m3 scales"
        return f"fp8 {self.element}" if self.element in _FP8 else self.element

    @property
    def label(self) -> str:
        """Group, name and what is unusual: "g64 nf4 double-quantised", "128x128 blocks fp8 e4m3", "g32 mxfp4"."""
        group = group_label(self.group_size)
        if self.tile_rows > 1:
            group = f"{self.tile_rows}x{self.group_size} blocks"
        unusual = " double-quantised" if self.scale == "nested" else ""
        if self.scale == "e8m0" and self.rounding != "round":
            unusual = f", scales by {self.rounding}"
        return f"{group} {self.name}{unusual}"

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.uint8

    @property
    def largest(self) -> float:
        """The largest magnitude of an element."""
        return _LARGEST[self.element]

    @property
    def zero_code(self) -> int:
        """The code of zero; on iq4_nl that of 1."""
        return {"nf4": 7, "iq4_nl": 8}.get(self.element, 0)

    def fit(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point (always 0) of groups: `weight` (..., n) -> two fp32 tensors (...).

        A group of zeros gets scale 1. Scales that a file codes together (e4m3, nested) are given as they are before
        that: only `fit_rows`, which sees the matrix, can round them.
        """
        scale = self._separate(self._extreme(weight.float()))
        return scale, torch.zeros_like(scale)

    def _extreme(self, groups: Tensor) -> Tensor:
        """Largest magnitude along the last axis; of iq4_nl, whose smallest element is its largest, with the sign that
        makes that weight -127 times the scale."""
        if self.element != "iq4_nl":
            return groups.abs().amax(-1)
        return -groups.gather(-1, groups.abs().argmax(-1, keepdim=True)).squeeze(-1)

    def _separate(self, largest: Tensor) -> Tensor:
        """Scales of groups with these largest magnitudes, each rounded by itself."""
        if self.scale == "e8m0":
            return round_to_power_of_two(largest, self.largest, self.rounding)
        return self.storable(largest / self.largest)

    def storable(self, scale: Tensor) -> Tensor:
        """Scales in fp32, rounded to the type of a plain scale; one that vanishes there becomes 1, unless no element
        is zero."""
        scale = scale.to(self.scale_dtype if self.scale == "plain" else torch.float32).float()
        if self.element == "iq4_nl":
            return scale
        return torch.where(scale == 0, torch.ones_like(scale), scale)

    def fit_rows(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points (always 0) of a matrix: `weight` (N, K) -> two fp32 tensors (N, G).

        What several rows share, all of them have: one scale of the matrix, or those of a block.
        """
        together = self.fit_coded(weight)
        scale = self._separate(self._largest(weight)) if together is None else together.decode()
        return scale, torch.zeros_like(scale)

    def fit_coded(self, weight: Tensor) -> ScaleCodes | None:
        """The scales of a matrix (N, K) as a file holds them, if they are coded together; None if each stands alone."""
        if self.scale == "e4m3":
            return encode_e4m3(self._largest(weight), self.largest)
        return encode_nested(self._largest(weight) / self.largest) if self.scale == "nested" else None

    def _largest(self, weight: Tensor) -> Tensor:
        """Largest magnitude of every group of a matrix (N, K): (N, G)."""
        weight = weight.float()
        rows, columns = weight.shape
        if self.group_size == "tensor":
            return self._extreme(weight.reshape(1, -1)).expand(rows, 1).clone()
        width = self.columns_per_group(columns)
        padded = torch.nn.functional.pad(weight, (0, -columns % width, 0, -rows % self.tile_rows))
        tiles = padded.reshape(-1, self.tile_rows, self.groups(columns), width).transpose(1, 2).flatten(2)
        tiles = self._extreme(tiles)
        return tiles.repeat_interleave(self.tile_rows, 0)[:rows]

    def encode(self, weight: Tensor, scale: Tensor, zero: Tensor | float = 0.0) -> Tensor:
        """Codes, uint8 in the shape of `weight`; `scale` broadcasts against it and `zero` is not used."""
        relative = (weight / scale).contiguous()
        if self.scale == "nested" or self.element == "iq4_nl":
            relative = torch.where(scale == 0, 0, relative)
        if self.element in _FP8:
            return relative.clamp(-self.largest, self.largest).to(_FP8[self.element]).view(torch.uint8)
        boundaries, codes = _nearest(self.element)
        return codes[torch.bucketize(relative, boundaries, out_int32=True)]

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | float = 0.0) -> Tensor:
        """Values of `codes` on the grid, in the dtype of `scale`; `zero` is not used."""
        return self.slope(codes).to(scale.dtype) * scale

    def slope(self, codes: Tensor, zero: Tensor | float = 0.0) -> Tensor:
        """What `decode` multiplies the scale by, and so its derivative with respect to it: fp32."""
        if self.element in _FP8:
            return codes.to(torch.uint8).view(_FP8[self.element]).float()
        return elements(self.element)[codes.int()]

    def scale_count(self, shape: tuple[int, ...]) -> int:
        """How many scales a matrix of `shape` has."""
        rows, columns = shape
        return 1 if self.group_size == "tensor" else -(-rows // self.tile_rows) * self.groups(columns)

    def scale_bytes(self, shape: tuple[int, ...]) -> int:
        """Bytes of the stored scales of a matrix of `shape`."""
        count = self.scale_count(shape)
        if self.scale == "plain":
            return count * self.scale_dtype.itemsize
        return count + 4 * shared_numbers(self.scale, count)


ScaledGrid = IntegerGrid | FloatGrid
"""Grids on which every weight is a code and a group of weights has a scale."""


@functools.cache
def elements(element: Element) -> Tensor:
    """What every code stands for: fp32 (2**bits,). FP8 has NaN, and E5M2 infinities, among them."""
    if element in _FP8:
        return torch.arange(256, dtype=torch.uint8).view(_FP8[element]).float()
    if element in _POSITIONS:
        return torch.tensor(_NF4 if element == "nf4" else _IQ4_NL, dtype=torch.float32)
    positive = {"fp4": [0, 0.0625, 8, 12, 4, 6, 2, 3], "e2m1": [0, 0.5, 1, 1.5, 2, 3, 4, 6]}[element]
    values = torch.tensor([*positive, *(-value for value in positive)])
    return values / 12 if element == "fp4" else values


@functools.cache
def _nearest(element: Element) -> tuple[Tensor, Tensor]:
    """Boundaries between neighbours in ascending order, and the code of the value below each and above the last."""
    values = elements(element)
    order = values.argsort(stable=True)
    if element not in _POSITIONS:
        order = order[order != 8]  # the second code of zero, whose sign says nothing
    ascending = values[order]
    middle = (ascending[:-1] + ascending[1:]) / 2
    if element == "e2m1":
        # `bucketize` puts a tie below: move the boundary where the value above has the even bit pattern
        middle = torch.where(order[1:] % 2 == 0, middle.nextafter(torch.tensor(-torch.inf)), middle)
    return middle, order.to(torch.uint8)
