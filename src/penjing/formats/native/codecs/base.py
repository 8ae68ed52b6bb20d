"""What a codec of the native format must answer, and the bit streams they all use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from penjing.errors import FormatError
from penjing.numerics.grids import Grid
from penjing.numerics.packing import pack_bits, packed_bytes, unpack_bits
from penjing.representations import Coded


@dataclass(frozen=True)
class Parts:
    """The stored tensors of one matrix, by part; reading one checks that it is there and has the size it must have.

    name  of the module, for errors
    """

    tensors: Mapping[str, Tensor]
    name: str

    def take(self, part: str, *shape: int) -> Tensor:
        """The tensor `weight_<part>`; FormatError if it is missing or its shape is not `shape`."""
        if part not in self.tensors:
            raise FormatError(f"{self.name}: weight_{part} missing; the checkpoint is damaged")
        tensor = self.tensors[part]
        if tuple(tensor.shape) != shape:
            raise FormatError(
                f"{self.name}.weight_{part} is {tuple(tensor.shape)} where {shape} is needed; the checkpoint is damaged"
            )
        return tensor

    def under(self, prefix: str) -> Parts:
        """The parts whose names begin with `prefix` and an underscore, by the rest of their names."""
        begin = f"{prefix}_"
        found = {part.removeprefix(begin): tensor for part, tensor in self.tensors.items() if part.startswith(begin)}
        return Parts(found, f"{self.name} ({prefix})")

    def codes(self, part: str, bits: int, count: int) -> Tensor:
        """`count` unsigned codes of a bit stream, uint8."""
        return unpack_bits(self.take(part, packed_bytes(count, bits)).reshape(1, -1), bits, count)[0]


class Codec(Protocol):
    """Stores the codes of one kind of grid. Weights that a pruning step removed are not stored."""

    name: str
    """In config.json."""
    grid: type[Any]
    """The class of grids it stores."""
    all_parts: tuple[str, ...]
    """Names of all tensors it may write, after `weight_`."""

    def parts(self, grid: Any) -> tuple[str, ...]:
        """Those it writes for codes on `grid`."""

    def entry(self, grid: Any) -> dict[str, Any]:
        """What config.json says about `grid`."""

    def read_grid(self, entry: Mapping[str, Any]) -> Grid:
        """The inverse of `entry`."""

    def nbytes(self, shape: tuple[int, ...], grid: Any, kept: int) -> int:
        """Bytes of what `write` makes of a matrix of `shape` of which `kept` weights are stored."""

    def write(self, weight: Any, kept: Tensor | None) -> dict[str, Tensor]:
        """Tensors by part; only codes where `kept` (bool (N, K)) holds are stored when it is given."""

    def read(self, parts: Parts, shape: tuple[int, int], grid: Any, kept: Tensor | None) -> Coded:
        """The inverse of `write`. Where `kept` does not hold, codes decode to zero."""


def stream(codes: Tensor, bits: int) -> Tensor:
    """Unsigned codes of any shape as one bit stream in row order: uint8, 1-D."""
    return pack_bits(codes.reshape(1, -1), bits)[0]


def stream_bytes(count: int, bits: int) -> int:
    """Bytes of `stream` for `count` codes."""
    return packed_bytes(count, bits)


def unsigned(codes: Tensor, bits: int) -> Tensor:
    """Signed codes of `bits` bits as uint8, shifted so that the smallest is 0."""
    return (codes.to(torch.int16) + 2 ** (bits - 1)).to(torch.uint8)


def signed(codes: Tensor, bits: int) -> Tensor:
    """The inverse of `unsigned`: int8."""
    return (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
