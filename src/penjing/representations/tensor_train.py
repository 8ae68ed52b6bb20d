"""A matrix whose rows are tensor trains, each by itself."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from penjing.numerics.tensor_trains import Train, rebuild_exactly


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
