"""A matrix as a product of two thin ones, and a compressed matrix with such a product added to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from penjing.representations.dense import Dense, Masked
from penjing.representations.quantized import Coded


@dataclass(frozen=True)
class LowRank:
    """`left @ right`, of rank r at most.

    left   (N, r)
    right  (r, K)
    """

    left: Dense | Coded
    right: Dense | Coded

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.left.shape[0], self.right.shape[1]))

    @property
    def rank(self) -> int:
        return self.right.shape[0]

    def dense(self) -> Tensor:
        """The product in fp32, summed in fp64: the same bits however the factors lie in memory."""
        return (self.left.dense().double() @ self.right.dense().double()).float()

    def nbytes(self) -> int:
        return self.left.nbytes() + self.right.nbytes()

    def rows(self, start: int, stop: int) -> LowRank:
        """The same for outputs `start` to `stop` only."""
        return LowRank(self.left.rows(start, stop), self.right)


@dataclass(frozen=True)
class Corrected:
    """A compressed matrix and a product that makes up for part of its error: `base + left @ right`."""

    base: Coded | Masked
    correction: LowRank

    @property
    def shape(self) -> torch.Size:
        return self.base.shape

    def dense(self) -> Tensor:
        """The sum in fp32."""
        return self.base.dense().float() + self.correction.dense()

    def nbytes(self) -> int:
        return self.base.nbytes() + self.correction.nbytes()

    def rows(self, start: int, stop: int) -> Corrected:
        """The same for outputs `start` to `stop` only."""
        return Corrected(self.base.rows(start, stop), self.correction.rows(start, stop))
