"""A compressed matrix of which a few values are stored as they are: whole columns (OWQ) or single weights (SpQR)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penjing.representations.quantized import Coded


@dataclass(frozen=True)
class Columns:
    """Whole columns.

    index   int32 (m,), ascending
    values  (N, m) in the storage dtype
    """

    index: Tensor
    values: Tensor

    def write(self, matrix: Tensor) -> None:
        """Put the values into `matrix` (N, K)."""
        matrix[:, self.index.long()] = self.values.to(matrix.dtype)

    def nbytes(self) -> int:
        return 4 * self.index.numel() + self.values.numel() * self.values.element_size()

    def rows(self, start: int, stop: int) -> Columns:
        """The same for outputs `start` to `stop` only."""
        return Columns(self.index, self.values[start:stop])


def index_dtype(columns: int) -> torch.dtype:
    """The smallest type that numbers so many columns."""
    return torch.int16 if columns <= 2**15 else torch.int32


@dataclass(frozen=True)
class Outliers:
    """Single weights in compressed rows: those of output n are `values[starts[n]:starts[n + 1]]`.

    starts  int32 (N + 1,), from 0 to the number of outliers
    index   (m,), the column of each, ascending in a row; int16 where `index_dtype` says that this is enough
    values  (m,) in the storage dtype
    """

    starts: Tensor
    index: Tensor
    values: Tensor

    @classmethod
    def of(cls, matrix: Tensor, chosen: Tensor) -> Outliers:
        """The entries of `matrix` (N, K) where `chosen` (bool (N, K)) holds."""
        starts = torch.nn.functional.pad(chosen.sum(1).cumsum(0), (1, 0)).int()
        return cls(starts, chosen.nonzero()[:, 1].to(index_dtype(matrix.shape[1])), matrix[chosen])

    def write(self, matrix: Tensor) -> None:
        """Put the values into `matrix` (N, K)."""
        counts = self.starts.diff().long()
        row = torch.arange(len(counts)).repeat_interleave(counts)
        matrix[row, self.index.long()] = self.values.to(matrix.dtype)

    def nbytes(self) -> int:
        each = self.index.element_size() + self.values.element_size()
        return 4 * self.starts.numel() + each * self.values.numel()

    def rows(self, start: int, stop: int) -> Outliers:
        """The same for outputs `start` to `stop` only."""
        first, last = int(self.starts[start]), int(self.starts[stop])
        return Outliers(self.starts[start : stop + 1] - first, self.index[first:last], self.values[first:last])


@dataclass(frozen=True)
class Patched:
    """A coded matrix in which `patch` takes the place of some values. The codes under the patch mean nothing."""

    base: Coded
    patch: Columns | Outliers

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    def dense(self) -> Tensor:
        """The matrix in fp32."""
        matrix = self.base.dense()
        self.patch.write(matrix)
        return matrix

    def nbytes(self) -> int:
        return self.base.nbytes() + self.patch.nbytes()

    def rows(self, start: int, stop: int) -> Patched:
        """The same for outputs `start` to `stop` only."""
        return Patched(self.base.rows(start, stop), self.patch.rows(start, stop))
