"""What the walk remembers of a linear's inputs. Each statistic is accumulated once and shared by all methods.

A statistic is made for K inputs, is fed token matrices (T, K), and can be rescaled when a method divides the
inputs by `s` and multiplies the weights by it (AWQ, SmoothQuant): nothing has to be collected twice.
Accumulation is in fp32 whatever the dtype of the activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from penjing.numerics.precision import holding


class Statistic(Protocol):
    """Accumulates something about the inputs of a linear."""

    tokens: int

    @property
    def value(self) -> Tensor:
        """What was accumulated so far."""

    def update(self, inputs: Tensor) -> None:
        """Take in a token matrix (T, K)."""

    def rescale(self, scale: Tensor) -> None:
        """The inputs were divided by `scale` (K,)."""


class Gram:
    """Sum of outer products of the inputs: `value` = X^T X, fp32 (K, K), T tokens.

    GPTQ's and SparseGPT's Hessian is twice this over the number of samples; their results depend on it only up
    to a factor, because damping is relative. Only what lies on and right of the diagonal is multiplied out, in
    strips of rows, which saves up to half the work; the rest is mirrored once, when `value` is first read.
    """

    def __init__(self, columns: int, *, strip: int = 256) -> None:
        self._sum = torch.zeros(columns, columns)
        self._strip = strip
        self._mirrored = True
        self.tokens = 0

    @classmethod
    def known(cls, value: Tensor, tokens: int) -> Gram:
        """One that has seen `tokens` tokens whose Gram matrix is `value` (K, K)."""
        gram = cls(len(value))
        gram._sum, gram.tokens = value, tokens
        return gram

    def update(self, inputs: Tensor) -> None:
        self.tokens += inputs.shape[0]
        exact = inputs.float()
        with holding(inputs.dtype):
            for top in range(0, inputs.shape[1], self._strip):
                bottom = top + self._strip
                self._sum[top:bottom, top:].addmm_(exact[:, top:bottom].T, exact[:, top:])
        self._mirrored = False

    @property
    def value(self) -> Tensor:
        if not self._mirrored:
            upper = self._sum.triu()
            self._sum = upper.add_(upper.triu(1).T)
            self._mirrored = True
        return self._sum

    def rescale(self, scale: Tensor) -> None:
        self._sum = self.value / (scale.float().unsqueeze(1) * scale.float())


def _add_by_halves(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add left^T right of the first half of the tokens to `total[0]`, of the second to `total[1]`."""
    halves = zip(left.float().tensor_split(2), right.float().tensor_split(2), strict=True)
    with holding(right.dtype):
        for half, (one, other) in enumerate(halves):
            total[half].addmm_(one.T, other)


class CrossGram:
    """What the inputs lost, against what they are: `value` is (X' - X)^T X of two halves of the tokens, fp32 (2, K, K).

    X are the inputs in the compressed model, X' those of the same tokens in the dense one; zero where the two agree.
    Row i belongs to the difference of input i. Two halves, because what is chance in one does not repeat in the other.
    Fed by `compare`; GPTAQ's asymmetric calibration needs it.
    """

    def __init__(self, columns: int) -> None:
        self.value = torch.zeros(2, columns, columns)
        self.tokens = 0

    def update(self, inputs: Tensor) -> None:
        """Take in tokens whose inputs are the same in both models."""
        self.tokens += inputs.shape[0]

    def compare(self, inputs: Tensor, lost: Tensor) -> None:
        """Take in inputs in the compressed model and how far those of the dense one are from them, both (T, K)."""
        self.tokens += inputs.shape[0]
        _add_by_halves(self.value, lost, inputs)

    def rescale(self, scale: Tensor) -> None:
        self.value = self.value / (scale.float().unsqueeze(1) * scale.float())


class StreamGap:
    """What the residual stream lost before a linear adds to it: `value` is (s' - s)^T X of two halves of the tokens.

    s (T, N) is the stream that the outputs of the linear, of inputs X (T, K), are added to in the compressed model, s'
    the same in the dense one; fp32 (2, N, K), without rows where the linear writes to no stream. Fed by `compare`.
    """

    def __init__(self, columns: int) -> None:
        self.value = torch.zeros(2, 0, columns)
        self.tokens = 0

    def update(self, inputs: Tensor) -> None:
        """Take in tokens that have the same stream in both models."""
        self.tokens += inputs.shape[0]

    def compare(self, inputs: Tensor, lost: Tensor) -> None:
        """Take in inputs (T, K) in the compressed model and what the stream lost (T, N) at the same tokens."""
        self.tokens += inputs.shape[0]
        if not self.value.numel():
            self.value = torch.zeros(2, lost.shape[1], inputs.shape[1])
        _add_by_halves(self.value, lost, inputs)

    def rescale(self, scale: Tensor) -> None:
        self.value = self.value / scale.float()


class ColumnNorm:
    """Sum of squares per input: `value` fp32 (K,). Wanda's `||x_j||_2` is its square root."""

    def __init__(self, columns: int) -> None:
        self.value = torch.zeros(columns)
        self.tokens = 0

    def update(self, inputs: Tensor) -> None:
        self.value += inputs.float().square().sum(0)
        self.tokens += inputs.shape[0]

    def rescale(self, scale: Tensor) -> None:
        self.value = self.value / scale.float().square()


class AbsMax:
    """Largest magnitude per input: `value` fp32 (K,). SmoothQuant's `max |x_j|`."""

    def __init__(self, columns: int) -> None:
        self.value = torch.zeros(columns)
        self.tokens = 0

    def update(self, inputs: Tensor) -> None:
        self.value = torch.maximum(self.value, inputs.abs().amax(0).float())
        self.tokens += inputs.shape[0]

    def rescale(self, scale: Tensor) -> None:
        self.value = self.value / scale.float()


class MeanAbs:
    """Mean magnitude per input: `value` fp32 (K,). AWQ's saliency of a channel."""

    def __init__(self, columns: int) -> None:
        self._sum = torch.zeros(columns)
        self.tokens = 0

    def update(self, inputs: Tensor) -> None:
        self._sum += inputs.abs().float().sum(0)
        self.tokens += inputs.shape[0]

    @property
    def value(self) -> Tensor:
        return self._sum / max(self.tokens, 1)

    def rescale(self, scale: Tensor) -> None:
        self._sum = self._sum / scale.float()


class Mean:
    """Mean per input: `value` fp32 (K,), summed in fp64."""

    def __init__(self, columns: int) -> None:
        self._sum = torch.zeros(columns, dtype=torch.float64)
        self.tokens = 0

    def update(self, inputs: Tensor) -> None:
        self._sum += inputs.sum(0, dtype=torch.float64)
        self.tokens += inputs.shape[0]

    @property
    def value(self) -> Tensor:
        return (self._sum / max(self.tokens, 1)).float()

    def rescale(self, scale: Tensor) -> None:
        self._sum = self._sum / scale.double()


StatisticType = Callable[[int], Statistic]
Statistics = Mapping[StatisticType, Statistic]


def unseen(kinds: Iterable[StatisticType], columns: int) -> Statistics:
    """Statistics of a linear with K = `columns` inputs that no token reached: as if these were independent."""
    statistics = {kind: kind(columns) for kind in kinds}
    for statistic in statistics.values():
        statistic.update(torch.eye(columns))
    return statistics


def compares(kind: StatisticType) -> bool:
    """Whether a statistic looks at the dense model beside the compressed one."""
    return kind in (CrossGram, StreamGap)


def weighs(kind: StatisticType) -> bool:
    """Whether tokens count in a statistic as much as `calibration.token_weights` says; all alike in the others."""
    return kind in (Gram, CrossGram, StreamGap)


class TokenSample:
    """A few of the inputs themselves: `value` (T', K) in the dtype seen, T' at most `limit`.

    Every call contributes the same number of evenly spaced tokens until the sample is full.
    """

    def __init__(self, columns: int, *, limit: int = 512, per_call: int = 64) -> None:
        self.value = torch.zeros(0, columns)
        self.tokens = 0
        self._limit, self._per_call = limit, per_call

    def update(self, inputs: Tensor) -> None:
        self.tokens += inputs.shape[0]
        room = min(self._limit - self.value.shape[0], self._per_call, inputs.shape[0])
        if room > 0:
            position = torch.linspace(0, inputs.shape[0] - 1, room).long()
            self.value = torch.cat([self.value.to(inputs.dtype), inputs[position]])

    def rescale(self, scale: Tensor) -> None:
        self.value = self.value / scale.to(self.value.dtype)


class BlockStatistic(Protocol):
    """Accumulates something about what a decoder block does to the hidden state."""

    @property
    def value(self) -> float:
        """What was accumulated so far."""

    def update(self, before: Tensor, after: Tensor) -> None:
        """Take in hidden states (T, D) before and after the block."""


class CosineChange:
    """Block influence of ShortGPT (Men et al. 2024, eq. 1): mean over tokens of 1 - cos(before, after)."""

    def __init__(self) -> None:
        self._sum = 0.0
        self._tokens = 0

    def update(self, before: Tensor, after: Tensor) -> None:
        cosine = torch.cosine_similarity(before.float(), after.float(), dim=-1)
        self._sum += float((1 - cosine).sum(dtype=torch.float64))
        self._tokens += before.shape[0]

    @property
    def value(self) -> float:
        return self._sum / max(self._tokens, 1)


BlockStatisticType = Callable[[], BlockStatistic]
