"""How much rank a matrix keeps, as recipe keys, and where factors would not be smaller."""

from __future__ import annotations

from dataclasses import replace
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from penjing.methods.base import Options
from penjing.representations import Dense, LowRank, Scheme


class RankOptions(Options):
    """Recipe keys of every method that makes a matrix a product: one of `rank` and `ratio`."""

    rank: int | None = Field(None, ge=1, description="columns of the left factor, rows of the right one")
    ratio: float | None = Field(
        None, gt=0, lt=1, description="parameters of both factors over those of the matrix; the rank follows per matrix"
    )
    multiple: int = Field(8, ge=1, description="ranks that follow from `ratio` are rounded down to a multiple of this")

    @model_validator(mode="after")
    def _one_of_both(self) -> Self:
        if (self.rank is None) == (self.ratio is None):
            raise ValueError("give either `rank` or `ratio` (of the parameters), not both and not neither")
        return self

    def rank_of(self, shape: tuple[int, ...]) -> int:
        """The rank for a matrix of `shape` (N, K); at least 1."""
        if self.rank is not None:
            return self.rank
        exact = int((self.ratio or 0) * shape[0] * shape[1]) // sum(shape)
        return max(exact // self.multiple * self.multiple, 1)

    def for_matrix(self, shape: tuple[int, ...], storage_dtype: torch.dtype) -> Self:
        """With `rank` in place of `ratio`."""
        return self.model_copy(update={"rank": self.rank_of(shape), "ratio": None})

    def declines(self, shape: tuple[int, ...]) -> str:
        """Where both factors together are not smaller than the matrix."""
        rows, columns = shape
        rank = self.rank_of(shape)
        if rank * (rows + columns) < rows * columns:
            return ""
        most = (rows * columns - 1) // (rows + columns)
        return f"two factors of rank {rank} are not smaller than {rows} x {columns}; below rank {most + 1} they are"

    def scheme(self, before: Scheme, storage_dtype: torch.dtype) -> Scheme:
        if not before.dense:
            raise ValueError("low rank comes before pruning and quantisation: its factors can be quantised afterwards")
        return replace(before, rank=self.rank or 0)


def product(left: Tensor, right: Tensor, storage_dtype: torch.dtype) -> LowRank:
    """Factors (N, r) and (r, K) in the type that is stored."""
    return LowRank(Dense(left.to(storage_dtype).contiguous()), Dense(right.to(storage_dtype).contiguous()))
