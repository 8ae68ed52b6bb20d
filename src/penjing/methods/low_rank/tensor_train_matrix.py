"""A whole embedding as one tensor train over rows and columns together (see `numerics.train_matrices`).

    numbers = sum_k r_{k-1} v_k d_k r_k        V = v_1 ... v_N rows, D = d_1 ... d_N columns

`tensor-train` cuts every row by itself and uses nothing that rows have in common; this cuts all rows together, as a
product of two factors (`svd`) does, and like it needs no text. It is the form in which embeddings are trained from the
start; made from a trained table it assumes that tokens with neighbouring numbers are alike, which tokenizers do not
see to.

Worked example, V = D = 4, v = d = (2, 2), rank 1: every Kronecker product of two 2 x 2 matrices is exact, with 8
numbers in place of 16.

Where the output head is tied to the embedding it computes with the same approximate rows.

Source: Hrinchuk et al. 2020, "Tensorized Embedding Layers" (arXiv:1901.10787).
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Self

import torch
from pydantic import Field, model_validator

from penjing.methods.base import LinearInput, Options
from penjing.numerics.tensor_trains import near_modes
from penjing.numerics.train_matrices import TrainMatrix, covering_modes, decompose_matrix
from penjing.representations import Scheme, TensorTrainMatrix


class TrainMatrixOptions(Options):
    """Recipe keys of a tensor train over a whole matrix: one of `rank` and `ratio`."""

    rank: int | None = Field(None, ge=1, description="largest rank between two cores")
    ratio: float | None = Field(
        None, gt=0, lt=1, description="numbers in the cores over those of the matrix, at most; the rank follows"
    )
    cores: int = Field(3, ge=2, description="into how many factors rows and columns are cut, as equal as they can be")
    rows: tuple[int, ...] | None = Field(
        None, description="the factors of the rows themselves; may exceed them a little"
    )
    columns: tuple[int, ...] | None = Field(None, description="the factors of the columns themselves")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if (self.rank is None) == (self.ratio is None):
            raise ValueError("give either `rank` or `ratio` (of the parameters), not both and not neither")
        if (self.rows is None) != (self.columns is None) or len(self.rows or ()) != len(self.columns or ()):
            raise ValueError("`rows` and `columns` go together and have as many factors")
        return self

    def train(self, shape: tuple[int, ...]) -> TrainMatrix:
        """How a matrix of `shape` (V, D) is cut; ValueError when the factors do not fit it."""
        rows, columns = self.rows, self.columns
        if rows is None or columns is None:
            rows, columns = covering_modes(shape[0], self.cores), near_modes(shape[1], self.cores)
        if math.prod(rows) < shape[0] or math.prod(columns) != shape[1]:
            raise ValueError(
                f"rows {list(rows)} and columns {list(columns)} multiply to {math.prod(rows)} x {math.prod(columns)}, "
                f"but the matrix is {shape[0]} x {shape[1]}"
            )
        if self.rank is not None:
            return TrainMatrix.of_rank(rows, columns, self.rank)
        most, low, high = (self.ratio or 0) * shape[0] * shape[1], 1, min(shape)
        while low < high:
            middle = (low + high + 1) // 2
            fits = sum(TrainMatrix.of_rank(rows, columns, middle).sizes) <= most
            low, high = (middle, high) if fits else (low, middle - 1)
        return TrainMatrix.of_rank(rows, columns, low)

    def for_matrix(self, shape: tuple[int, ...], storage_dtype: torch.dtype) -> Self:
        """With all that follows from the shape worked out."""
        train = self.train(shape)
        chosen = {"rank": max(train.ranks), "ratio": None, "rows": train.rows, "columns": train.columns}
        return self.model_copy(update=chosen)

    def declines(self, shape: tuple[int, ...]) -> str:
        """Where the cores hold as many numbers as the matrix."""
        train = self.train(shape)
        held, whole = sum(train.sizes), shape[0] * shape[1]
        return "" if held < whole else f"{train.label} has {held} numbers, and the matrix {whole} itself"

    def scheme(self, before: Scheme, storage_dtype: torch.dtype) -> Scheme:
        if not before.dense:
            raise ValueError("a tensor train is made of the dense matrix; make it the only step there")
        return replace(before, train=TrainMatrix.of_rank(self.rows or (), self.columns or (), self.rank or 1))


def linear(given: LinearInput, options: TrainMatrixOptions) -> TensorTrainMatrix:
    """Cut one matrix, usually an embedding."""
    train = options.train(tuple(given.weight.shape))
    cores = decompose_matrix(given.weight, train)
    return TensorTrainMatrix(cores.to(given.storage_dtype), train, len(given.weight))
