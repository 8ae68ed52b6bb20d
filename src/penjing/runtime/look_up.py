"""What linears have in common that multiply a few tokens by table look-up and many by decoded weights.

A few tokens, as when a model writes text, are multiplied by a kernel that reads the weights from memory in their few
bits, where a look-up does the work of several multiplications. Many tokens, as in a prompt, are multiplied by the
decoded weights, a slice of the rows at a time, which never needs the whole dense matrix.
"""

from __future__ import annotations

import ctypes
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from penjing.runtime.coded_linear import CodedLinear

MOST_TOKENS = 8
"""Up to so many tokens, looking up is faster than decoding."""

_SLICE = 1 << 17
"""Decoded weights at a time: half a megabyte, which stays in the cache."""

TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Numbers that kernels have for the types of scales."""


def detached_bias(layer: nn.Module) -> Tensor | None:
    """The bias of a live linear, or None."""
    bias = layer._parameters.get("bias")
    return None if bias is None else bias.detach()


@dataclass
class Kernel:
    """What a call needs, looked up once.

    matrix    the kernel's description of the weights
    held      the tensors it points at
    multiply  (matrix, x, y, tokens, threads) -> 0, or 1 when memory runs out
    decode    (matrix, values, first block, blocks, threads)
    block     rows that lie together
    """

    matrix: ctypes.Structure
    held: tuple[Tensor | None, ...]
    multiply: Any
    decode: Any
    rows: int
    columns: int
    block: int

    def __post_init__(self) -> None:
        self.address = ctypes.addressof(self.matrix)
        count, pointer = ctypes.c_int64, ctypes.c_void_p
        self.multiply.argtypes = (pointer, pointer, pointer, count, ctypes.c_int)
        self.decode.argtypes, self.decode.restype = (pointer, pointer, count, count, ctypes.c_int), None

    def look_up(self, x: Tensor, y: Tensor, tokens: int) -> None:
        """Multiply `x` (..., K) into `y` (..., N), both fp32 and contiguous, of that many tokens."""
        if self.multiply(self.address, x.data_ptr(), y.data_ptr(), tokens, torch.get_num_threads()):
            raise MemoryError("no memory for the look-up tables")

    def decode_and_multiply(self, x: Tensor, y: Tensor, tokens: int) -> None:
        """The same, some rows of the matrix at a time."""
        x, y = x.view(tokens, self.columns), y.view(tokens, self.rows)
        blocks = max(_SLICE // self.columns // self.block, 1)
        scratch = torch.empty(blocks * self.block * self.columns)
        for first in range(0, -(-self.rows // self.block), blocks):
            start, stop = first * self.block, min((first + blocks) * self.block, self.rows)
            count = -(-(stop - start) // self.block)
            values = scratch[: count * self.block * self.columns].view(self.columns, -1)
            self.decode(self.address, values.data_ptr(), first, count, torch.get_num_threads())
            torch.mm(x, values[:, : stop - start], out=y[:, start:stop])


class LookUpLinear(CodedLinear):
    """A linear with `weight` (N, K) as packed codes; not trainable.

    inputs      (K,) that inputs are multiplied by first, or None
    bias        (N,), or None
    transposed  the `weight` that it shows is (K, N), as in GPT-2's `Conv1D`

    Computes in fp32 and answers in the dtype of its input. Needs a kernel and a CPU to be fast; on another device,
    or where a gradient is wanted, it multiplies by the decoded weights.
    """

    inputs: Tensor | None
    bias: Tensor | None

    def __init__(
        self, shape: tuple[int, ...], bias: Tensor | None, *, transposed: bool, inputs: Tensor | None = None
    ) -> None:
        super().__init__()
        self.transposed = transposed
        self.out_features, self.in_features = shape
        self.register_buffer("inputs", inputs)
        self.register_buffer("bias", bias)
        self._ready: Kernel | None = None

    @abstractmethod
    def decoded(self) -> Tensor:
        """The weights (N, K) in fp32, with the factors of the inputs."""

    @abstractmethod
    def kernel(self) -> Kernel | None:
        """What multiplies, for the tensors where they lie now; None where none can be had."""

    @property
    def weight(self) -> Tensor:
        """The decoded weights, fp32, computed anew, as a dense module would hold them."""
        values = self.decoded()
        return values.T.contiguous() if self.transposed else values

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        ready = self._ready
        if ready is None:
            ready = self._ready = self.kernel()
        if ready is None or x.device.type != "cpu" or (x.requires_grad and torch.is_grad_enabled()):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return linear(x, self.decoded().to(x.dtype), bias)
        given = x if x.dtype == torch.float32 and x.is_contiguous() else x.float().contiguous()
        given = given if self.inputs is None else given * self.inputs
        y = torch.empty((*x.shape[:-1], self.out_features))
        tokens = x.numel() // self.in_features
        (ready.look_up if tokens <= MOST_TOKENS else ready.decode_and_multiply)(given, y, tokens)
        if self.bias is not None:
            y += self.bias
        return y if x.dtype == torch.float32 else y.to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LookUpLinear:
        """Tensors may move: their addresses are looked up again."""
        super()._apply(fn, recurse)
        self._ready = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without addresses, which mean nothing in a copy."""
        return self.__dict__ | {"_ready": None}
