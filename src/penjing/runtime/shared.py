"""Linears that compute with the weight of another linear, which alone is in memory.

y = output_scale * (W x) + bias        W of the owner, whatever it is held as
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.functional import linear
from transformers.pytorch_utils import Conv1D

from penjing.runtime.coded_linear import CodedLinear


class SharedLinear(CodedLinear):
    """A linear without a weight of its own; not trainable.

    owner         the linear whose weight it uses: a plain one or one that computes with codes
    output_scale  (N,), or None
    bias          (N,), or None
    """

    owner: Any
    output_scale: Tensor | None
    bias: Tensor | None

    def __init__(self, owner: nn.Module, output_scale: Tensor | None = None, bias: Tensor | None = None) -> None:
        super().__init__()
        self.__dict__["owner"] = owner  # not a child: its parameters belong to the block where it stands
        self.register_buffer("output_scale", output_scale)
        self.register_buffer("bias", bias)

    @property
    def weight(self) -> Tensor:
        """The weight as if it had one, scaled, as a dense module would hold it."""
        weight: Tensor = self.owner.weight.detach()
        if self.output_scale is None:
            return weight
        return weight * (self.output_scale if self._is_transposed else self.output_scale.unsqueeze(1))

    @property
    def _is_transposed(self) -> bool:
        return isinstance(self.owner, Conv1D) or getattr(self.owner, "transposed", False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        y = self._product(x)
        if self.output_scale is not None:
            y = y * self.output_scale
        return y if self.bias is None else y + self.bias

    def _product(self, x: Tensor) -> Tensor:
        if isinstance(self.owner, nn.Linear):
            return linear(x, self.owner.weight)
        if isinstance(self.owner, Conv1D):
            return x @ self.owner.weight
        y: Tensor = self.owner(x)
        return y if self.owner.bias is None else y - self.owner.bias

    def extra_repr(self) -> str:
        """For `print(model)`."""
        return f"scaled={self.output_scale is not None}, bias={self.bias is not None}"
