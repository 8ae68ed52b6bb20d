"""A matrix whose rows are tensor trains, each by itself, and one that is a single train."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from penjing.numerics.tensor_trains import Train, rebuild_exactly
from penjing.numerics.train_matrices import TrainMatrix, rebuild_matrix
from penjing.representations.dense import Dense


@dataclass(frozen=True)
class TensorTrain:
    """Rows as chains of small cores.

    cores  (N, P) in the storage dtype: the cores of a row, one after the other
    train  how rows are cut
    """

    cores: Tensor
    train: Train

    @property
    def shape(self) -> torch.Size:
        width = 1
        for mode in self.train.modes:
            width *= mode
        return torch.Size((len(self.cores), width))

    def dense(self) -> Tensor:
        """The matrix in fp32."""
        return rebuild_exactly(self.cores, self.train)

    def nbytes(self) -> int:
        return self.cores.numel() * self.cores.element_size()

    def rows(self, start: int, stop: int) -> TensorTrain:
        """The same for rows `start` to `stop` only."""
        return replace(self, cores=self.cores[start:stop])


@dataclass(frozen=True)
class TensorTrainMatrix:
    """One train for all rows together.

    cores   (P,) in the storage dtype, one after the other
    train   how the matrix is cut
    height  rows of the matrix; the train may have more, which are padding
    """

    cores: Tensor
    train: TrainMatrix
    height: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((self.height, math.prod(self.train.columns)))

    def dense(self) -> Tensor:
        """The matrix in fp32."""
        return rebuild_matrix(self.cores, self.train, self.height)

    def nbytes(self) -> int:
        return self.cores.numel() * self.cores.element_size()

    def rows(self, start: int, stop: int) -> Dense | TensorTrainMatrix:
        """The same for rows `start` to `stop` only, which no longer are a train unless all are meant."""
        if (start, stop) == (0, self.height):
            return self
        return Dense(self.dense()[start:stop])
