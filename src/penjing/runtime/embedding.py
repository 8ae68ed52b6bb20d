"""Embeddings that look up rows of a compressed table: only the rows that are asked for are ever computed."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from penjing.numerics.tensor_trains import Train, rebuild
from penjing.numerics.train_matrices import TrainMatrix, cores_of, rebuild_matrix, rows_of
from penjing.representations import LowRank, Representation, TensorTrain, TensorTrainMatrix
from penjing.runtime.coded_linear import CodedLinear


class CodedEmbedding(CodedLinear):
    """An embedding whose table (V, D) is held in another form; not trainable."""

    bias: Tensor | None = None

    def forward(self, tokens: Tensor) -> Tensor:
        """Token ids (...) -> (..., D)."""
        return self.look_up(tokens.reshape(-1)).reshape(*tokens.shape, -1)

    @abstractmethod
    def look_up(self, tokens: Tensor) -> Tensor:
        """Rows (T, D) of tokens (T,)."""


class FactoredEmbedding(CodedEmbedding):
    """A table that is a product: `left` (V, r) rows times `right` (r, D)."""

    left: Tensor
    right: Tensor

    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.register_buffer("left", left.contiguous())
        self.register_buffer("right", right.contiguous())

    @property
    def weight(self) -> Tensor:
        """The table."""
        return (self.left.double() @ self.right.double()).to(self.left.dtype)

    def look_up(self, tokens: Tensor) -> Tensor:
        """A row of the left factor per token, times the right one."""
        return self.left[tokens] @ self.right


class TrainEmbedding(CodedEmbedding):
    """A table of tensor trains: `cores` (V, P)."""

    cores: Tensor

    def __init__(self, cores: Tensor, train: Train) -> None:
        super().__init__()
        self.train_of_rows = train
        self.register_buffer("cores", cores.contiguous())

    @property
    def weight(self) -> Tensor:
        """The table."""
        return rebuild(self.cores.double(), self.train_of_rows).to(self.cores.dtype)

    def look_up(self, tokens: Tensor) -> Tensor:
        """The cores of each token, multiplied out."""
        return rebuild(self.cores[tokens], self.train_of_rows)


class TrainMatrixEmbedding(CodedEmbedding):
    """A table that is one tensor train: `cores` (P,)."""

    cores: Tensor

    def __init__(self, cores: Tensor, train: TrainMatrix, height: int) -> None:
        super().__init__()
        self.train_of_table, self.height = train, height
        self.register_buffer("cores", cores.contiguous())

    @property
    def weight(self) -> Tensor:
        """The table."""
        return rebuild_matrix(self.cores, self.train_of_table, self.height).to(self.cores.dtype)

    def look_up(self, tokens: Tensor) -> Tensor:
        """The slices of the cores that each token names, multiplied out."""
        return rows_of(cores_of(self.cores, self.train_of_table), tokens)


def runner(layer: nn.Module, weight: Representation) -> Callable[[], nn.Module] | None:
    """What makes the embedding for a live `layer`, in its dtype; None for other tables and for layers that do more."""
    if type(layer) is not nn.Embedding or layer.max_norm is not None:
        return None
    dtype = layer.weight.dtype
    if isinstance(weight, TensorTrain):
        return partial(TrainEmbedding, weight.cores.to(dtype), weight.train)
    if isinstance(weight, TensorTrainMatrix):
        return partial(TrainMatrixEmbedding, weight.cores.to(dtype), weight.train, weight.height)
    if isinstance(weight, LowRank):
        return partial(FactoredEmbedding, weight.left.dense().to(dtype), weight.right.dense().to(dtype))
    return None
