"""What a weight becomes. Codes are kept unpacked here; `formats` decide how they lie on disk.

Every representation answers the same two questions: `dense()`, the matrix it stands for, and `nbytes()`, the
information it needs on disk when codes are packed to their bit width (a format may need more and says so).
Matrices are (N, K): N outputs, K inputs, as in `torch.nn.Linear`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from penjing.numerics.grids import IntegerGrid


@dataclass(frozen=True)
class Scheme:
    """What a plan promises that a weight will become: enough to size it, to refuse it and to describe it on disk.

    grid         the integer grid of the weight; None keeps it dense
    sparsity     fraction of weights removed; 0 keeps all
    pattern      (zeros, of) for N:M sparsity: 2:4 removes 2 of every 4 consecutive inputs
    activations  bits of dynamic per-token quantisation of the inputs; None without
    ordered      columns are grouped out of order and need a stored group index
    """

    grid: IntegerGrid | None = None
    sparsity: float = 0.0
    pattern: tuple[int, int] | None = None
    activations: int | None = None
    ordered: bool = False

    @property
    def dense(self) -> bool:
        """Nothing is done to the weight."""
        return self == Scheme()


@dataclass(frozen=True)
class Dense:
    """The values themselves."""

    values: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.values.shape

    def dense(self) -> Tensor:
        """The matrix, in its own dtype."""
        return self.values

    def nbytes(self) -> int:
        return self.values.numel() * self.values.element_size()

    def rows(self, start: int, stop: int) -> Dense:
        """The same for outputs `start` to `stop` only."""
        return Dense(self.values[start:stop])


@dataclass(frozen=True)
class Quantized:
    """Integer codes on a grid.

    codes       int8 (N, K), signed: -2**(bits-1) <= code <= 2**(bits-1)-1
    scale       (N, G) in the grid's `scale_dtype`
    zero_point  int8 (N, G), signed like the codes; None when the grid is symmetric
    grid        the grid the codes lie on
    group_index int32 (K,): the group each column belongs to; None when groups are consecutive columns
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    grid: IntegerGrid
    group_index: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.codes.shape

    def dense(self) -> Tensor:
        """The decoded matrix in fp32: `scale * (codes - zero_point)`, exact products of stored numbers."""
        return self.decode(self.codes)

    def decode(self, codes: Tensor) -> Tensor:
        """Values that `codes` (N, K) would have with these scales and zero points."""
        columns = codes.shape[1]
        scale = self._per_column(self.scale.float(), columns)
        if self.zero_point is None:
            return codes.float() * scale
        return (codes.float() - self._per_column(self.zero_point.float(), columns)) * scale

    def _per_column(self, per_group: Tensor, columns: int) -> Tensor:
        if self.group_index is not None:
            return per_group[:, self.group_index.long()]
        return self.grid.spread(per_group, columns)

    def nbytes(self) -> int:
        rows, columns = self.codes.shape
        scales = 1 if self.grid.group_size == "tensor" else self.scale.numel()
        zeros = 0 if self.zero_point is None else scales
        order = 0 if self.group_index is None else columns * 4
        bits = self.grid.bits
        return -(-rows * columns * bits // 8) + scales * self.scale.element_size() + -(-zeros * bits // 8) + order

    def rows(self, start: int, stop: int) -> Quantized:
        """The same for outputs `start` to `stop` only."""
        zero_point = None if self.zero_point is None else self.zero_point[start:stop]
        return replace(self, codes=self.codes[start:stop], scale=self.scale[start:stop], zero_point=zero_point)


@dataclass(frozen=True)
class Masked:
    """Values of which only some are kept; the others are exactly zero.

    kept  bool (N, K), True where the weight survives
    """

    values: Dense | Quantized
    kept: Tensor

    @property
    def shape(self) -> torch.Size:
        return self.kept.shape

    def dense(self) -> Tensor:
        """The matrix with zeros where weights were removed."""
        return self.values.dense() * self.kept

    def nbytes(self) -> int:
        """One bit per weight for the mask, and the surviving values."""
        rows, columns = self.kept.shape
        kept = int(self.kept.sum())
        mask = -(-rows * columns // 8)
        if isinstance(self.values, Dense):
            return mask + kept * self.values.values.element_size()
        dropped = rows * columns - kept
        return mask + self.values.nbytes() - dropped * self.values.grid.bits // 8

    def rows(self, start: int, stop: int) -> Masked:
        """The same for outputs `start` to `stop` only."""
        return Masked(self.values.rows(start, stop), self.kept[start:stop])


Representation = Dense | Quantized | Masked
