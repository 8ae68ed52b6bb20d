"""TensorGPT: every row of an embedding is a tensor train (a matrix-product state) of its own.

A row of D = I_1 ... I_N numbers becomes a chain of N cores (see `numerics.tensor_trains`), found by SVDs row by row:
without training, without text, and new tokens can be added without touching others. Stored are

    sum_k r_{k-1} I_k r_k   numbers per row, where D were

so that 768 = 2^8 * 3 at rank 1 takes 19, 40 times fewer. What rows have in common is not used at all; a product of two
factors (`svd` on the embedding) or fewer bits often lose much less at the same size: see the benchmark.

Worked example, D = 4 = 2 * 2, rank 1: x = [1, 2, 2, 4] is [[1, 2], [2, 4]] = [1, 2]^T [1, 2]: exact, though nothing is
saved (4 numbers). D = 8 = 2 * 2 * 2 at rank 1 takes 6.

Where the output head is tied to the embedding it computes with the same approximate rows.

Source: Xu, Xu, Mandic 2023, "TensorGPT: Efficient Compression of the Embedding Layer in LLMs based on the Tensor-Train
Decomposition" (arXiv:2307.00526).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from penjing.methods.base import LinearInput, Options
from penjing.numerics.tensor_trains import Train, decompose, near_modes
from penjing.representations import Scheme, TensorTrain


class TensorTrainOptions(Options):
    """Recipe keys of TensorGPT."""

    rank: int = Field(1, ge=1, description="largest rank between two cores")
    cores: int = Field(
        3, ge=2, description="of each row: its width is cut into so many factors, as equal as they can be"
    )
    modes: tuple[int, ...] | None = Field(None, description="the factors themselves, in place of `cores`")

    @model_validator(mode="after")
    def _real_factors(self) -> Self:
        if self.modes is not None and (len(self.modes) < 2 or min(self.modes) < 2):
            raise ValueError("`modes` are two or more factors of the width, each at least 2")
        return self

    def train(self, width: int) -> Train:
        """How rows of `width` are cut; ValueError when the modes do not multiply to it."""
        modes = self.modes or near_modes(width, self.cores)
        if torch.Size(modes).numel() != width:
            raise ValueError(
                f"modes {list(modes)} multiply to {torch.Size(modes).numel()}, but rows have {width} numbers"
            )
        return Train.of_rank(modes, self.rank)

    def for_matrix(self, shape: tuple[int, ...], storage_dtype: torch.dtype) -> Self:
        """With `modes` in place of `cores`."""
        return self.model_copy(update={"modes": self.train(shape[1]).modes})

    def declines(self, shape: tuple[int, ...]) -> str:
        """Where the cores hold as many numbers as the row."""
        train = self.train(shape[1])
        held = sum(train.sizes)
        return "" if held < shape[1] else f"{train.label} has {held} numbers per row, which has {shape[1]} itself"

    def scheme(self, before: Scheme, storage_dtype: torch.dtype) -> Scheme:
        if not before.dense:
            raise ValueError("a tensor train is made of the dense matrix; make it the only step there")
        return replace(before, train=Train.of_rank(self.modes or (), self.rank))


def tensor_train(weight: Tensor, train: Train, storage_dtype: torch.dtype = torch.bfloat16) -> TensorTrain:
    """Every row of `weight` (V, D) as a tensor train."""
    return TensorTrain(decompose(weight, train).to(storage_dtype), train)


def linear(given: LinearInput, options: TensorTrainOptions) -> TensorTrain:
    """Cut one matrix, usually an embedding."""
    return tensor_train(given.weight, options.train(given.weight.shape[1]), given.storage_dtype)
