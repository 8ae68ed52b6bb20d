"""KIVI: keys and values of past tokens in few bits, each rounded along the axis where its outliers lie.

A few channels of the keys are large for every token, so tokens share a range inside a channel; values have no such
channels, so a token's channels share a range:

    keys    per channel, g tokens together     values    per token, g channels together
    s = (max - min) / (2**bits - 1)            q = round((x - min) / s)            x' = q s + min

The minimum is a float, not a whole zero point. Keys are taken after the rotary embedding, as they lie in the cache. The
newest tokens stay as they are: keys are rounded R at a time, when R have gathered; values one by one, once R newer ones
follow. So after n tokens floor(n / R) R keys and max(n - R, 0) values are coded, however the tokens came in.

Worked example, 2 bits, g = 2: keys of two tokens [[0, 5], [3, 5]] (a row is a token) have the ranges [0, 3] and [5, 5]:

    s = [1, 1]    min = [0, 5]    q = [[0, 0], [3, 0]]    x' = [[0, 5], [3, 5]]

A constant group has no range; its scale is 1 here, its codes are 0 and its values exact (the authors divide by zero).

Source: Liu et al. 2024, "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache" (arXiv:2402.02750), section 4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from penjing.errors import PlanError

CONFIG_KEY = "kv_cache"
"""Where a model's config.json says how its cache is to be quantised."""

_PARTS = {2: ((0, 2),), 3: ((0, 2), (2, 1)), 4: ((0, 4),), 8: ((0, 8),)}
"""Bits -> (shift, width) of the stretches a code is cut into; widths divide a byte."""


class KVCache(BaseModel):
    """How a model's key-value cache is quantised."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    bits: Literal[2, 3, 4, 8] = Field(4, description="bits per key and value")
    group_size: int = Field(32, ge=2, description="tokens (keys) or channels (values) that share a scale and a minimum")
    residual: int = Field(128, ge=2, description="newest tokens kept as they are, a multiple of `group_size`")

    @model_validator(mode="after")
    def _whole_groups(self) -> Self:
        if self.residual % self.group_size:
            raise ValueError(f"residual {self.residual} is not a multiple of group_size {self.group_size}")
        return self

    @classmethod
    def of(cls, **keys: Any) -> Self:
        """From loose keys; None leaves a default. Raises PlanError that names the key that does not fit."""
        try:
            return cls.model_validate({key: value for key, value in keys.items() if value is not None})
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(["KV cache", *map(str, problem["loc"])])
            raise PlanError(f"{where}: {problem['msg'].removeprefix('Value error, ')}") from error

    @property
    def label(self) -> str:
        """In words: "4 bits, groups of 32, residual 128"."""
        return f"{self.bits} bits, groups of {self.group_size}, residual {self.residual}"


@dataclass(frozen=True)
class Packed:
    """Coded keys or values of T tokens and D channels.

    codes    uint8 (..., T, packed_width(D, bits))
    scale    (..., T / g, 1, D) of keys, (..., T, ceil(D / g), 1) of values
    minimum  like `scale`

    Tokens run along axis -2 of the codes and -3 of the others, so that parts are cut and joined without decoding.
    """

    codes: Tensor
    scale: Tensor
    minimum: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """All there is."""
        return self.codes, self.scale, self.minimum

    def joined(self, newer: Packed) -> Packed:
        """These tokens and then the newer ones."""
        codes = torch.cat([self.codes, newer.codes], -2)
        return Packed(codes, torch.cat([self.scale, newer.scale], -3), torch.cat([self.minimum, newer.minimum], -3))

    def tokens(self, start: int, stop: int, per_scale: int) -> Packed:
        """A copy of tokens [start, stop), whole groups of the `per_scale` tokens that share a scale (values: 1)."""
        groups = slice(start // per_scale, -(-stop // per_scale))
        parts = (self.codes[..., start:stop, :], self.scale[..., groups, :, :], self.minimum[..., groups, :, :])
        return Packed(*(part.clone() for part in parts))


def quantise_keys(keys: Tensor, bits: int, group_size: int, scale_dtype: torch.dtype | None = None) -> Packed:
    """Keys (..., T, D) of any float type -> codes, per channel in groups of `group_size` tokens.

    Scales and minima are rounded to `scale_dtype` (the keys' own for None) before codes are computed. NaN or infinity
    makes its whole group NaN. Raises ValueError when T is no multiple of the group.
    """
    if keys.shape[-2] % group_size:
        raise ValueError(f"{keys.shape[-2]} tokens are not whole groups of {group_size}")
    grouped = keys.unflatten(-2, (-1, group_size))
    codes, scale, minimum = _round(grouped, -2, bits, scale_dtype or keys.dtype)
    return Packed(pack_codes(codes.flatten(-3, -2), bits), scale, minimum)


def quantise_values(values: Tensor, bits: int, group_size: int, scale_dtype: torch.dtype | None = None) -> Packed:
    """Values (..., T, D) of any float type -> codes, per token in groups of `group_size` channels.

    The last group of a token is shorter when D is no multiple of the group. Otherwise as `quantise_keys`.
    """
    channels = values.shape[-1]
    grouped = _whole(values, min(group_size, channels))
    codes, scale, minimum = _round(grouped, -1, bits, scale_dtype or values.dtype)
    return Packed(pack_codes(codes.flatten(-2)[..., :channels], bits), scale, minimum)


def dequantise_keys(packed: Packed, bits: int, channels: int, dtype: torch.dtype) -> Tensor:
    """Coded keys -> (..., T, D) in `dtype`."""
    codes = unpack_codes(packed.codes, bits, channels).unflatten(-2, (packed.scale.shape[-3], -1))
    return torch.addcmul(packed.minimum.to(dtype), codes.to(dtype), packed.scale.to(dtype)).flatten(-3, -2)


def dequantise_values(packed: Packed, bits: int, channels: int, dtype: torch.dtype, group_size: int) -> Tensor:
    """Coded values -> (..., T, D) in `dtype`."""
    codes = _whole(unpack_codes(packed.codes, bits, channels), min(group_size, channels))
    decoded = torch.addcmul(packed.minimum.to(dtype), codes.to(dtype), packed.scale.to(dtype))
    return decoded.flatten(-2)[..., :channels]


def _round(grouped: Tensor, axis: int, bits: int, scale_dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Codes uint8, scale and minimum of groups that lie along `axis`, which the latter two keep with length 1."""
    low, high = torch.aminmax(grouped, dim=axis, keepdim=True)
    low, high = low.float(), high.float()
    scale = ((high - low) / (2**bits - 1)).to(scale_dtype)
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    minimum = low.to(scale_dtype)
    codes = (grouped.float() - minimum.float()).div_(scale.float()).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8), scale, minimum


def _whole(values: Tensor, group: int) -> Tensor:
    """(..., D) -> (..., ceil(D / group), group); a short last group repeats its last entry, which moves no range."""
    missing = -values.shape[-1] % group
    if missing:
        values = torch.cat([values, values[..., -1:].expand(*values.shape[:-1], missing)], -1)
    return values.unflatten(-1, (-1, group))


def packed_width(count: int, bits: int) -> int:
    """Bytes that `pack_codes` makes of `count` codes."""
    return sum(_part_width(count, width) for _, width in _PARTS[bits])


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Codes (..., n) uint8 below 2**bits -> bytes (..., packed_width(n, bits)).

    Byte j of m holds the codes j, j + m, j + 2m, ...: whole stretches of a row are shifted and joined at once, which
    is what makes this quick on processors of both kinds. Three bits are two bits and one bit, one after the other.
    """
    return torch.cat([_pack_part((codes >> shift) & (2**width - 1), width) for shift, width in _PARTS[bits]], -1)


def unpack_codes(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse of `pack_codes`: -> codes (..., count), uint8."""
    pieces = packed.split([_part_width(count, width) for _, width in _PARTS[bits]], -1)
    codes, *higher = [_unpack_part(piece, part[1], count) for piece, part in zip(pieces, _PARTS[bits], strict=True)]
    for part, (shift, _) in zip(higher, _PARTS[bits][1:], strict=True):
        codes = codes | (part << shift)
    return codes


def _part_width(count: int, width: int) -> int:
    return -(-count * width // 8)


def _pack_part(codes: Tensor, width: int) -> Tensor:
    per_byte = 8 // width
    rows = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % per_byte)).unflatten(-1, (per_byte, -1))
    packed = rows[..., 0, :]
    for place in range(1, per_byte):
        packed = packed | (rows[..., place, :] << (place * width))
    return packed


def _unpack_part(packed: Tensor, width: int, count: int) -> Tensor:
    if width == 8:
        return packed
    rows = [(packed >> shift) & (2**width - 1) for shift in range(0, 8, width)]
    return torch.cat(rows, -1)[..., :count]
