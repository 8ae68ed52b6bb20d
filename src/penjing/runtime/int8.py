"""Linears that multiply integers: int8 weights, inputs rounded to int8 when they come, sums in int32.

    Y[m, n] = s[m] t[n] (sum_k A[m, k] B[n, k] - z[m] sum_k B[n, k]) + bias[n]

with A the codes of the inputs, s and z their scale and zero point (one per token, or one for all when it was measured
during calibration), B the codes of the weights and t their scale. The sum over k is exact, so the result is that of the
decoded weights and inputs (`numerics.activations`), rounded less often.

The sums of B belong to the weight and are made once. Where a column of the batch reaches the threshold of LLM.int8(),
A is zero there, and the column is multiplied as it is by the decoded weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from penjing.numerics.activations import Activations, InputScale, in_dtype
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Masked, Quantized, Representation, Scheme
from penjing.runtime.coded_linear import CodedLinear

EXACT_COLUMNS = 1024
"""Products of 8-bit codes that fp32 adds up exactly, in any order: 2**10 * 2**7 * 2**7 = 2**24."""

_CUDA_ROWS = 17
"""Fewest rows that the kernel behind `torch._int_mm` takes on CUDA."""


class Int8Linear(CodedLinear):
    """A linear of int8 codes (N, K) with one scale per output; inputs are rounded by `how`.

    codes       int8 (N, K)
    scale       (N, 1)
    bias        (N,), or None
    how         integers; static ones need `static`
    dtype       of the inputs and outputs, and of `weight`
    transposed  `weight` is (K, N), as in GPT-2's `Conv1D`
    """

    codes: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        how: Activations,
        static: InputScale | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        transposed: bool = False,
    ) -> None:
        super().__init__()
        self.how, self.dtype, self.transposed = how, dtype, transposed
        self.out_features, self.in_features = codes.shape
        self.register_buffer("codes", codes.contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("bias", bias)
        self.register_buffer("sums", None if how.symmetric else codes.sum(1, dtype=torch.int32))
        self.register_buffer("input_scale", None if static is None else static.scale)
        self.register_buffer("input_zero_point", None if static is None else static.zero)

    @property
    def weight(self) -> Tensor:
        """The decoded weights, computed anew, as the dense module would hold them."""
        values = (self.codes.float() * self.scale.float()).to(self.dtype)
        return values.T.contiguous() if self.transposed else values

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        flat = x.reshape(-1, self.in_features)
        return self._multiply(flat, None).reshape(*x.shape[:-1], self.out_features)

    def _multiply(self, x: Tensor, beside: Tensor | None) -> Tensor:
        """(M, K) -> (M, N); `beside` is added before the bias."""
        by = self._input_scale(x)
        codes = self.how.encode(x, by).to(torch.int8)
        sums = integer_product(codes, self.codes)
        if by.zero is not None:
            sums = sums - by.zero.to(torch.int32) * self.get_buffer("sums")
        y = sums.float().mul_(self.scale.float().T).mul_(by.scale.float())
        if beside is not None:
            y += beside
        if self.bias is not None:
            y += self.bias.float()
        return y.to(x.dtype)

    def _input_scale(self, x: Tensor) -> InputScale:
        if self.how.dynamic:
            return self.how.fit_dynamic(x)
        zero = None if self.how.symmetric else self.get_buffer("input_zero_point")
        return in_dtype(InputScale(self.get_buffer("input_scale"), zero), x.dtype)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, inputs={self.how}"


class LLMInt8Linear(Int8Linear):
    """The same, with the columns that reach the threshold multiplied as they are."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N). Columns are chosen for the whole batch."""
        flat = x.reshape(-1, self.in_features)
        dense = self.how.outliers(flat)
        columns = dense.nonzero().flatten()
        if not len(columns):
            return super().forward(x)
        weights = self.codes[:, columns].float() * self.scale.float()
        beside = flat[:, columns].float() @ weights.T
        return self._multiply(flat.masked_fill(dense, 0), beside).reshape(*x.shape[:-1], self.out_features)


def integer_product(left: Tensor, right: Tensor) -> Tensor:
    """`left` (M, K) int8 times the transpose of `right` (N, K) int8: int32 (M, N), exact for K below 2**17."""
    rows, columns = left.shape
    if left.device.type == "cpu" and columns > 1:  # for one column torch 2.13 gives numbers from nowhere
        return torch._int_mm(left, right.T)
    if left.device.type == "cuda" and columns % 8 == 0 and len(right) % 8 == 0 and columns and len(right):
        padded = torch.nn.functional.pad(left, (0, 0, 0, max(0, _CUDA_ROWS - rows)))
        return torch._int_mm(padded, right.T)[:rows]
    return float_product(left, right)


def float_product(left: Tensor, right: Tensor) -> Tensor:
    """The same with fp32 arithmetic, in pieces whose sums are exact; for devices and shapes without integer kernels."""
    total = torch.zeros(len(left), len(right), dtype=torch.int32, device=left.device)
    for a, b in zip(left.split(EXACT_COLUMNS, 1), right.split(EXACT_COLUMNS, 1), strict=True):
        total += (a.float() @ b.float().T).to(torch.int32)
    return total


def runner(
    linear: nn.Module, scheme: Scheme, weight: Representation, static: InputScale | None
) -> Callable[[], nn.Module] | None:
    """What makes the integer linear for a live `linear`; None when weights or inputs are no such integers."""
    how, coded = scheme.activations, weight.values if isinstance(weight, Masked) else weight
    if how is None or how.kind != "int" or not isinstance(coded, Quantized) or not isinstance(coded.grid, IntegerGrid):
        return None
    if coded.zero_point is not None or coded.group_index is not None or coded.scale.shape[1] != 1:
        return None
    return partial(_made, linear, how, coded, weight.kept if isinstance(weight, Masked) else None, static)


def _made(
    linear: nn.Module, how: Activations, weight: Quantized, kept: Tensor | None, static: InputScale | None
) -> nn.Module:
    live = linear.get_parameter("weight")
    bias = linear._parameters.get("bias")
    made = (LLMInt8Linear if how.threshold is not None else Int8Linear)(
        weight.codes if kept is None else weight.codes * kept,
        weight.scale,
        None if bias is None else bias.detach(),
        how,
        static,
        dtype=live.dtype,
        transposed=not isinstance(linear, nn.Linear),
    )
    return made.to(live.device)
