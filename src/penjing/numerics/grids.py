"""Integer grids: which real numbers a few bits can say, and how scale and zero point are fitted.

A grid maps a real `w` to a code and back,

    code = clamp(round(w / scale) + zero, low, high)        w_hat = scale * (code - zero)

with signed codes `low = -2**(bits-1)`, `high = 2**(bits-1) - 1` everywhere in Penjing (a format that stores
unsigned codes adds 2**(bits-1) to code and zero alike). Rounding is to the nearest, ties to even (`torch.round`).

The named rules for the scale of a symmetric grid, with `m = max|w|` of the group:

    full        m / ((2**bits - 1) / 2)        GPTQ, llm-compressor, compressed-tensors
    narrow      m / (2**(bits-1) - 1)          AWQ, SmoothQuant, TensorRT: the code `low` is never used
    wide        m / 2**(bits-1)                ZeroQuant (DeepSpeed): +m clips by one step
    signed-max  w[argmax|w|] / -2**(bits-1)    GGUF Q4_0, ONNX Runtime, AutoRound: the scale may be negative,
                                               the largest weight is exact

An asymmetric grid spans `[min(w, 0), max(w, 0)]`. Its zero point is a whole number, so that zero is always
representable and pruned weights stay zero, or (HQQ) any number, which is added before rounding:

    code = clamp(round(w / scale + zero), low, high)        w_hat = scale * (code - zero)

Or the grid has no zero point and stores the value of its first point instead (GGUF's Q4_1 and Q5_1). Zero need not be
on such a grid; `[min(w), max(w)]` is spanned as it is:

    code = clamp(round((w - minimum) / scale) + low, low, high)        w_hat = scale * (code - low) + minimum
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

ScaleRule = Literal["full", "narrow", "wide", "signed-max"]
ZeroPoint = Literal["integer", "float", "minimum"]


class Grid(Protocol):
    """The points that a coded weight may take: bits per code, groups that share a scale, and how to get there."""

    @property
    def bits(self) -> int:
        """Bits per code."""

    @property
    def group_size(self) -> int | Literal["tensor"] | None:
        """Consecutive inputs that share a scale; None: a row; `"tensor"`: the matrix."""

    @property
    def label(self) -> str:
        """The grid in the field's shorthand, after the bits: "g64 symmetric"."""


def group_label(group_size: int | Literal["tensor"] | None) -> str:
    """What shares a scale, in the field's shorthand: "g64", "per channel", "per tensor"."""
    if isinstance(group_size, int):
        return f"g{group_size}"
    return "per channel" if group_size is None else "per tensor"


class Grouped:
    """What every grid with consecutive groups along the last axis shares."""

    group_size: int | Literal["tensor"] | None

    def columns_per_group(self, columns: int) -> int:
        """Width of a full group in a row of `columns` inputs (the row itself when there are no groups)."""
        return min(self.group_size, columns) if isinstance(self.group_size, int) else columns

    def groups(self, columns: int) -> int:
        """Number of scales in a row of `columns` inputs, counting a shorter last group."""
        return -(-columns // self.columns_per_group(columns))

    def spread(self, per_group: Tensor, columns: int) -> Tensor:
        """Repeat (N, G) values along the inputs they belong to: -> (N, columns)."""
        if per_group.shape[1] == 1:
            return per_group.expand(-1, columns)
        return per_group.repeat_interleave(self.columns_per_group(columns), 1)[:, :columns]


@dataclass(frozen=True)
class IntegerGrid(Grouped):
    """A uniform grid of 2**bits levels, fitted per group along the last axis.

    `group_size` is the number of consecutive inputs that share a scale; `None` means the whole row
    (per-channel) and `"tensor"` one scale for the whole matrix. The last group of a row may be shorter.
    Scales are rounded to `scale_dtype`, the type they are stored in, *before* codes are computed, so that
    what is written decodes to exactly what the method saw. So are zero points of kind `float`, and minima, which stand
    where others have zero points when `zero` is `minimum`; zero points of kind `integer` are stored like codes. A
    symmetric grid has no zero point, whatever its kind.

    With `scale_bits`, scales and minima are whole numbers of so many bits times one number in `scale_dtype` per
    `block_size` inputs (see `numerics.super_blocks`): what `fit` gives of a group is then what is still to be coded.
    """

    bits: int = 4
    group_size: int | Literal["tensor"] | None = 128
    symmetric: bool = True
    scale_rule: ScaleRule = "full"
    scale_dtype: torch.dtype = torch.bfloat16
    zero: ZeroPoint = "integer"
    scale_bits: int = 0
    block_size: int = 256

    @property
    def label(self) -> str:
        """Group, symmetry and what is unusual: "g64 symmetric signed-max", "g64 asymmetric, float zero"."""
        group = group_label(self.group_size)
        coded = f", {self.scale_bits}-bit scales" if self.scale_bits else ""
        if not self.symmetric:
            kind = {"integer": "", "float": ", float zero", "minimum": ", minimum"}[self.zero]
            return f"{group} asymmetric{kind}{coded}"
        return f"{group} symmetric" + ("" if self.scale_rule == "full" else f" {self.scale_rule}") + coded

    @property
    def offset(self) -> bool:
        """Whether a minimum is added to the values, where other grids take a zero point off the codes."""
        return self.zero == "minimum" and not self.symmetric

    @property
    def scale_range(self) -> tuple[int, int]:
        """Smallest and largest code of a coded scale; those of symmetric grids have a sign, minima never have."""
        if self.symmetric:
            return -(2 ** (self.scale_bits - 1)), 2 ** (self.scale_bits - 1) - 1
        return 0, 2**self.scale_bits - 1

    @property
    def groups_per_block(self) -> int:
        """Groups whose scales are coded together."""
        assert isinstance(self.group_size, int)
        return self.block_size // self.group_size

    @property
    def code_dtype(self) -> torch.dtype:
        return torch.int8

    @property
    def zero_dtype(self) -> torch.dtype:
        """The type that zero points are stored in."""
        return torch.int8 if self.zero == "integer" else self.memory_dtype

    @property
    def memory_dtype(self) -> torch.dtype:
        """The type of scales in memory: products of codes are fp32."""
        return torch.float32 if self.scale_bits else self.scale_dtype

    @property
    def low(self) -> int:
        return -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        return 2 ** (self.bits - 1) - 1

    def code_bytes(self, count: int) -> int:
        """Bytes of `count` packed codes."""
        return -(-count * self.bits // 8)

    def fit(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point of groups: `weight` (..., n) -> two float tensors (...).

        Works in fp32. A group of zeros gets scale 1 and so stays exactly zero.
        """
        weight = weight.float()
        if self.symmetric:
            scale = self._symmetric_scale(weight)
            zero = torch.zeros_like(scale)
        elif self.zero == "minimum":
            zero = self.storable_zero(weight.amin(-1))
            scale = self.storable((weight.amax(-1) - zero) / (2**self.bits - 1))
        else:
            smallest = weight.amin(-1).clamp(max=0)
            largest = weight.amax(-1).clamp(min=0)
            scale = self.storable((largest - smallest) / (2**self.bits - 1))
            zero = self.storable_zero(self.low - smallest / scale)
        return scale, zero

    def _symmetric_scale(self, weight: Tensor) -> Tensor:
        if self.scale_rule == "signed-max":
            position = weight.abs().argmax(-1, keepdim=True)
            return self.storable(weight.gather(-1, position).squeeze(-1) / self.low)
        divisor = {"full": (2**self.bits - 1) / 2, "narrow": self.high, "wide": -self.low}[self.scale_rule]
        return self.storable(weight.abs().amax(-1) / divisor)

    def storable(self, scale: Tensor) -> Tensor:
        """Scales in fp32, rounded to the storage type; one that vanishes there becomes 1: its group decodes to zero."""
        scale = scale.to(self.memory_dtype).float()
        return torch.where(scale == 0, torch.ones_like(scale), scale)

    def storable_zero(self, zero: Tensor) -> Tensor:
        """Zero points, or minima, in fp32, moved to the nearest that can be stored."""
        if self.zero != "integer":
            return zero.clamp(max=0) if self.scale_bits else zero.to(self.scale_dtype).float()
        return torch.round(zero).clamp(self.low, self.high)

    def encode(self, weight: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes as floats, same shape as `weight`; `scale` and `zero` broadcast against it."""
        if self.scale_bits:
            scale = torch.where(scale == 0, 1, scale)
        if self.zero == "float":
            return torch.round((weight / scale).add_(zero)).clamp_(self.low, self.high)
        if self.offset:
            return torch.round((weight - zero) / scale).add_(self.low).clamp_(self.low, self.high)
        return torch.round(weight / scale).add_(zero).clamp_(self.low, self.high)

    def decode(self, codes: Tensor, scale: Tensor, zero: Tensor | float) -> Tensor:
        """Values of `codes` on the grid, in the dtype of `scale`."""
        values = self.slope(codes, zero) * scale
        return values + zero if self.offset else values

    def slope(self, codes: Tensor, zero: Tensor | float) -> Tensor:
        """What `decode` multiplies the scale by, and so its derivative with respect to it."""
        return codes - (self.low if self.offset else zero)

    def fit_rows(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zero points of a matrix: `weight` (N, K) -> two fp32 tensors (N, G).

        G is `groups(K)`; a per-tensor grid repeats its one scale in every row, so that N rows can be
        treated alike.
        """
        rows, columns = weight.shape
        if self.group_size == "tensor":
            scale, zero = self.fit(weight.reshape(1, -1))
            return scale.expand(rows).unsqueeze(1).clone(), zero.expand(rows).unsqueeze(1).clone()
        width = self.columns_per_group(columns)
        whole = columns // width * width
        fitted = [self.fit(weight[:, :whole].reshape(rows, -1, width))] if whole else []
        if whole < columns:
            scale, zero = self.fit(weight[:, whole:])
            fitted.append((scale.unsqueeze(1), zero.unsqueeze(1)))
        scales, zeros = zip(*fitted, strict=True)
        return torch.cat(scales, 1), torch.cat(zeros, 1)
