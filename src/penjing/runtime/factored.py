"""Linears whose weight is a product of two thin matrices: two small products in place of a large one.

y = left (right x) + bias        r (N + K) multiplications per token instead of N K
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from penjing.numerics.activations import InputScale
from penjing.representations import LowRank, Representation, Scheme
from penjing.runtime.coded_linear import CodedLinear


class FactoredLinear(CodedLinear):
    """A linear with `weight` (N, K) of rank r, held as decoded factors; not trainable.

    left        (N, r)
    right       (r, K)
    bias        (N,), or None
    transposed  the `weight` that it shows is (K, N), as in GPT-2's `Conv1D`
    """

    left: Tensor
    right: Tensor
    bias: Tensor | None

    def __init__(self, left: Tensor, right: Tensor, bias: Tensor | None = None, *, transposed: bool = False) -> None:
        super().__init__()
        self.transposed = transposed
        self.register_buffer("left", left.contiguous())
        self.register_buffer("right", right.contiguous())
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> Tensor:
        """The product, computed anew, as a dense module would hold it."""
        product = (self.left.double() @ self.right.double()).to(self.left.dtype)
        return product.T.contiguous() if self.transposed else product

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return linear(linear(x, self.right), self.left, self.bias)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        rank, columns = self.right.shape
        return f"in_features={columns}, out_features={len(self.left)}, bias={self.bias is not None}, rank={rank}"


def runner(
    layer: nn.Module, scheme: Scheme, weight: Representation, static: InputScale | None
) -> Callable[[], nn.Module] | None:
    """What makes the factored linear for a live `layer`, in its dtype; None for other weights."""
    if not isinstance(weight, LowRank) or scheme.activations is not None:
        return None
    return partial(_made, layer, weight)


def _made(layer: nn.Module, weight: LowRank) -> nn.Module:
    dtype: torch.dtype = layer.get_parameter("weight").dtype
    bias = layer._parameters.get("bias")
    return FactoredLinear(
        weight.left.dense().to(dtype),
        weight.right.dense().to(dtype),
        None if bias is None else bias.detach(),
        transposed=not isinstance(layer, nn.Linear),
    )
