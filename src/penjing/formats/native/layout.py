"""One compressed matrix as a handful of tensors, self-describing, every code at its exact bit width.

    weight_header       int32 (4,): outputs N, inputs K, bits (0: values, not codes), group size (0: row, -1: matrix)
    weight_codes        uint8: codes + 2**(bits-1) of the kept weights in row order, one bit stream (see `packing`)
    weight_values       the kept weights themselves, when bits is 0
    weight_scale        (N, G), or (1,) for one scale per matrix
    weight_zero_point   uint8: zero points + 2**(bits-1) as a bit stream; absent when symmetric
    weight_group_index  int32 (K,): group of each column; absent when groups are consecutive
    weight_mask         uint8: one bit per weight, 1 where it is kept; absent when all are

The last group of a row may be shorter. Names follow the module's name and a dot.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from penjing.errors import FormatError
from penjing.formats.base import zero_codes
from penjing.formats.packing import pack_bits, packed_bytes, unpack_bits
from penjing.numerics.grids import IntegerGrid, ScaleRule
from penjing.representations import Dense, Masked, Quantized, Representation

PARTS = ("header", "codes", "values", "scale", "zero_point", "group_index", "mask")
"""Names of the tensors, after `weight_`."""

_ROW, _MATRIX = 0, -1


def to_parts(weight: Quantized | Masked) -> dict[str, Tensor]:
    """The tensors that stand for `weight`, by part."""
    rows, columns = weight.shape
    kept = weight.kept if isinstance(weight, Masked) else None
    parts = {} if kept is None else {"mask": _stream(kept.to(torch.uint8), 1)}
    quantized = weight.values if isinstance(weight, Masked) else weight
    if isinstance(quantized, Dense):
        parts["values"] = quantized.values[kept].contiguous()
        return parts | {"header": torch.tensor([rows, columns, 0, 0], dtype=torch.int32)}
    grid, one = quantized.grid, quantized.grid.group_size == "tensor"
    codes = quantized.codes if kept is None else quantized.codes[kept]
    parts["codes"] = _stream(_unsigned(codes, grid.bits), grid.bits)
    parts["scale"] = (quantized.scale[:1, 0] if one else quantized.scale).contiguous()
    if quantized.zero_point is not None:
        zero = quantized.zero_point[:1] if one else quantized.zero_point
        parts["zero_point"] = _stream(_unsigned(zero, grid.bits), grid.bits)
    if quantized.group_index is not None:
        parts["group_index"] = quantized.group_index.to(torch.int32)
    size = grid.group_size if isinstance(grid.group_size, int) else _MATRIX if one else _ROW
    return parts | {"header": torch.tensor([rows, columns, grid.bits, size], dtype=torch.int32)}


def from_parts(parts: Mapping[str, Tensor], name: str, scale_rule: ScaleRule = "full") -> Quantized | Masked:
    """The inverse of `to_parts`; raises FormatError naming the module `name` and the part that is wrong."""
    if "header" not in parts:
        raise FormatError(f"{name}: weight_header is missing; the checkpoint is incomplete")
    rows, columns, bits, size = parts["header"].tolist()
    kept: Tensor | None = None
    if "mask" in parts:
        kept = _unstream(parts["mask"], 1, rows * columns, f"{name}.weight_mask").reshape(rows, columns).bool()
    count = rows * columns if kept is None else int(kept.sum())
    _check_parts(parts, bits, kept is not None, name)
    if bits == 0 and kept is not None:
        return Masked(Dense(_scatter(_exactly(parts["values"], count, f"{name}.weight_values"), kept)), kept)
    scale = parts["scale"]
    group_size = {_ROW: None, _MATRIX: "tensor"}.get(size, size)
    grid = IntegerGrid(bits, group_size, "zero_point" not in parts, scale_rule, scale.dtype)
    shape = (1,) if group_size == "tensor" else (rows, grid.groups(columns))
    if tuple(scale.shape) != shape:
        raise FormatError(
            f"{name}.weight_scale is {tuple(scale.shape)} where {shape} is needed; the checkpoint is damaged"
        )
    if "group_index" in parts:
        _exactly(parts["group_index"], columns, f"{name}.weight_group_index")
    zero = None
    if not grid.symmetric:
        zero = _signed(_unstream(parts["zero_point"], bits, scale.numel(), f"{name}.weight_zero_point"), bits)
        zero = zero.reshape(scale.shape)
    if group_size == "tensor":
        scale = scale.reshape(1, 1).expand(rows, 1).contiguous()
        zero = None if zero is None else zero.reshape(1, 1).expand(rows, 1).contiguous()
    codes = _signed(_unstream(parts["codes"], bits, count, f"{name}.weight_codes"), bits)
    if kept is not None:
        blank = Quantized(torch.zeros(rows, columns, dtype=torch.int8), scale, zero, grid, parts.get("group_index"))
        filled = zero_codes(blank).clone()
        filled[kept] = codes
        return Masked(Quantized(filled, scale, zero, grid, blank.group_index), kept)
    return Quantized(codes.reshape(rows, columns), scale, zero, grid, parts.get("group_index"))


def parts_bytes(
    shape: tuple[int, ...], grid: IntegerGrid | None, kept: int | None, ordered: bool, itemsize: int
) -> int:
    """Bytes of what `to_parts` makes of a matrix of `shape` with `kept` surviving weights (None: no mask).

    itemsize  bytes of a value that is not on a grid
    """
    rows, columns = shape
    total = 4 * 4 + (0 if kept is None else packed_bytes(rows * columns, 1))
    count = rows * columns if kept is None else kept
    if grid is None:
        return total + count * itemsize
    scales = 1 if grid.group_size == "tensor" else rows * grid.groups(columns)
    total += packed_bytes(count, grid.bits) + scales * grid.scale_dtype.itemsize
    total += 0 if grid.symmetric else packed_bytes(scales, grid.bits)
    return total + (4 * columns if ordered else 0)


def decoded(parts: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    """The matrix (N, K) in `dtype`: products in fp32, rounded once."""
    return decode(from_parts(parts, name), dtype)


def decode(weight: Representation, dtype: torch.dtype) -> Tensor:
    """The one way Penjing turns codes into values, in memory and when a file is loaded."""
    return weight.dense().to(dtype)


def _check_parts(parts: Mapping[str, Tensor], bits: int, masked: bool, name: str) -> None:
    needed = {"values"} if bits == 0 else {"codes", "scale"}
    allowed = needed | {"header", "mask"} | (set() if bits == 0 else {"zero_point", "group_index"})
    missing, extra = needed - parts.keys(), parts.keys() - allowed
    if bits == 0 and not masked:
        missing = missing | {"mask"}
    if missing or extra:
        wrong = sorted([f"weight_{part} missing" for part in missing] + [f"weight_{part} unexpected" for part in extra])
        raise FormatError(f"{name}: {', '.join(wrong)}; the checkpoint is damaged")


def _stream(values: Tensor, bits: int) -> Tensor:
    return pack_bits(values.reshape(1, -1), bits)[0]


def _unstream(stream: Tensor, bits: int, count: int, name: str) -> Tensor:
    _exactly(stream, packed_bytes(count, bits), name)
    return unpack_bits(stream.reshape(1, -1), bits, count)[0]


def _exactly(tensor: Tensor, count: int, name: str) -> Tensor:
    if tensor.numel() != count:
        raise FormatError(f"{name} has {tensor.numel()} elements where {count} are needed; the checkpoint is damaged")
    return tensor


def _scatter(values: Tensor, kept: Tensor) -> Tensor:
    full = torch.zeros(kept.shape, dtype=values.dtype)
    full[kept] = values
    return full


def _unsigned(codes: Tensor, bits: int) -> Tensor:
    return (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)


def _signed(codes: Tensor, bits: int) -> Tensor:
    return (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
