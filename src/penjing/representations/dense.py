"""Values as they are, all of them or only some."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penjing.representations.binary_coded import BinaryCoded
from penjing.representations.codebook import Codebook
from penjing.representations.quantized import Quantized


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
class Masked:
    """Values of which only some are kept; the others are exactly zero.

    kept  bool (N, K), True where the weight survives
    """

    values: Dense | Quantized | BinaryCoded | Codebook
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
