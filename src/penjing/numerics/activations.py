"""Quantisation of a linear's inputs at run time: which numbers they may be, and how they get there.

Integers, with `low = -2**(bits-1)` and `high = 2**(bits-1) - 1`:

    symmetric    scale = max|x| / ((2**bits - 1) / 2)                zero = 0
    asymmetric   scale = (max(x, 0) - min(x, 0)) / (2**bits - 1)     zero = low - min(x, 0) / scale, rounded
    code = round(clamp(x / scale + zero, low, high))                 x' = (code - zero) * scale

FP8 (E4M3): scale = max|x| / 448, x' = scale * E4M3(clamp(x / scale, -448, 448)).

A dynamic scale comes from the input itself, one per token or one for the batch. A static one was measured during
calibration, belongs to the linear and holds for all tokens. This is what compressed-tensors 0.20 does in
transformers: every operation runs, and rounds, in the dtype of `x`.

A `threshold` is the decomposition of LLM.int8() (Dettmers et al. 2022, arXiv:2208.07339, section 3): columns in which
some |x| of the batch reaches it keep their values, and the scale, max|x| / (2**(bits-1) - 1), is that of the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

E4M3 = torch.float8_e4m3fn
"""The 8-bit float of activations: 4 bits of exponent, 3 of mantissa, largest value 448."""


class InputScale(NamedTuple):
    """What turns inputs into codes; broadcasts against them. `zero` holds whole numbers, None for a symmetric grid."""

    scale: Tensor
    zero: Tensor | None = None


@dataclass(frozen=True)
class Activations:
    """How the inputs of a linear are quantised.

    bits         of a code
    kind         "int", or "float": FP8 (E4M3)
    dynamic      scales come from the input; otherwise from calibration, and are stored with the weight
    granularity  what shares a scale: a token, or the whole input
    symmetric    no zero point
    threshold    columns of the input that reach this magnitude keep their values (LLM.int8()); None: no column does
    """

    bits: int = 8
    kind: Literal["int", "float"] = "int"
    dynamic: bool = True
    granularity: Literal["token", "tensor"] = "token"
    symmetric: bool = True
    threshold: float | None = None

    @property
    def label(self) -> str:
        """What differs from dynamic symmetric integers per token, in words: "static inputs"; empty if nothing does."""
        words = ["FP8"] if self.kind == "float" else []
        words += ["asymmetric"] if not self.symmetric else []
        words += ["static"] if not self.dynamic else ["per-tensor"] if self.granularity == "tensor" else []
        rounded = f"{' '.join(words)} inputs" if words else ""
        outliers = f"inputs above {self.threshold:g} dense" if self.threshold is not None else ""
        return ", ".join(filter(None, (rounded, outliers)))

    @property
    def low(self) -> int:
        """Smallest code."""
        return -448 if self.kind == "float" else -(2 ** (self.bits - 1))

    @property
    def high(self) -> int:
        """Largest code."""
        return 448 if self.kind == "float" else 2 ** (self.bits - 1) - 1

    def fit(self, smallest: Tensor, largest: Tensor) -> InputScale:
        """Scale and zero point for inputs between two bounds (any shape, which the result has); in their dtype."""
        smallest, largest = smallest.clamp(max=0), largest.clamp(min=0)
        if self.threshold is not None:
            scale = torch.maximum(-smallest, largest) / self.high
        elif self.symmetric:
            scale = torch.maximum(-smallest, largest) / largest.new_tensor((self.high - self.low) / 2)
        else:
            scale = (largest - smallest) / (self.high - self.low)
        scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
        if self.symmetric:
            return InputScale(scale)
        return InputScale(scale, (self.low - smallest / scale).clamp(self.low, self.high).round())

    def fit_dynamic(self, x: Tensor) -> InputScale:
        """Scales of an input (..., K): one per vector of K, or one for all."""
        if self.granularity == "tensor":
            return self.fit(*torch.aminmax(x if x.numel() else x.new_zeros(1)))
        return self.fit(x.amin(-1, keepdim=True), x.amax(-1, keepdim=True))

    def encode(self, x: Tensor, by: InputScale) -> Tensor:
        """Codes of an input (..., K): whole numbers, or E4M3 values, in the dtype of `x`."""
        codes = x / by.scale
        if by.zero is not None:
            codes += by.zero
        codes.clamp_(self.low, self.high)
        return codes.to(E4M3).to(x.dtype) if self.kind == "float" else codes.round_()

    def outliers(self, x: Tensor) -> Tensor:
        """Columns that keep their values in a batch of inputs (..., K): bool (K,); none without a threshold."""
        threshold = math.inf if self.threshold is None else self.threshold
        return (x.abs() >= threshold).reshape(-1, x.shape[-1]).any(0)


def round_inputs(x: Tensor, how: Activations, static: InputScale | None = None) -> Tensor:
    """The values that a linear sees instead of `x` (..., K); same shape and dtype.

    static  the scale of an input that is not quantised dynamically, as `Activations.fit` gave it

    Zero stays zero. Equals the compressed-tensors loader bit for bit; per token only on inputs of three dimensions,
    as decoder linears get: on inputs of two dimensions that loader takes one scale for the whole matrix.
    """
    if x.numel() == 0:
        return x
    if how.threshold is not None:
        dense = how.outliers(x)
        rest = torch.where(dense, 0, x)
        by = how.fit_dynamic(rest)
        return torch.where(dense, x, how.encode(rest, by).mul_(by.scale))
    by = how.fit_dynamic(x) if static is None else in_dtype(static, x.dtype)
    codes = how.encode(x, by)
    return codes.mul_(by.scale) if by.zero is None else codes.sub_(by.zero).mul_(by.scale)


def in_dtype(by: InputScale, dtype: torch.dtype) -> InputScale:
    """A stored scale as it takes part in arithmetic of `dtype`."""
    return InputScale(by.scale.to(dtype), None if by.zero is None else by.zero.to(dtype))
