"""A linear whose weight stays codes while a change of low rank is trained beside it, as in QLoRA.

    y = x Q^T + b        dL/dx = dL/dy Q        Q decoded in the forward pass and again in the backward pass

Nothing keeps the decoded matrix between the two, so the model takes a byte and a share of a scale per weight, where a
dense one in fp32 takes four. No gradient of Q exists.

Worked example. Q = 0.5 * [[2, -1]], x = [1, 4]: y = 1 - 2 = -1; with dL/dy = 3, dL/dx = [3, -1.5].

Source: Dettmers et al. 2023, "QLoRA" (arXiv:2305.14314), section 3, equation 5.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from penjing.representations import Quantized


class _Product(torch.autograd.Function):
    """x Q^T for inputs (..., K) and codes of Q (N, K)."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, coded: Quantized) -> Tensor:
        ctx.coded = coded
        return inputs @ coded.dense().T.to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.coded.dense().to(gradient.dtype), None


class CodedLinear(nn.Module):
    """A linear of codes (N, K). Codes and scales move with the module and are not saved with a training."""

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, coded: Quantized, bias: Tensor | None) -> None:
        super().__init__()
        self._coded = replace(coded, scale_codes=None)
        self.register_buffer("codes", coded.codes, persistent=False)
        self.register_buffer("scale", coded.scale, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def weight(self) -> Quantized:
        """The codes, where they are now."""
        return replace(self._coded, codes=self.codes, scale=self.scale)

    def forward(self, inputs: Tensor) -> Tensor:
        """Outputs (..., N) for inputs (..., K)."""
        outputs: Tensor = _Product.apply(inputs, self.weight())
        return outputs if self.bias is None else outputs + self.bias

    def dense(self) -> nn.Linear:
        """The plain linear of the decoded values, in fp32."""
        rows, columns = self.codes.shape
        plain = nn.Linear(columns, rows, bias=self.bias is not None, device="meta").requires_grad_(False)
        plain.weight = nn.Parameter(self.weight().dense(), requires_grad=False)
        if self.bias is not None:
            plain.bias = nn.Parameter(self.bias, requires_grad=False)
        return plain


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Let the submodule `name` of `model` be `module`."""
    parent, _, own = name.rpartition(".")
    setattr(model.get_submodule(parent), own, module)
