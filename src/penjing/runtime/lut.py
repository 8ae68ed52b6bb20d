"""Linears of binary-coded weights that multiply by looking up (LUT-GEMM, arXiv:2206.09557).

    y[n] = sum_g ( sum_i alpha[n, g, i] sum_{k in g} b_i[n, k] x[k] + offset[n, g] sum_{k in g} x[k] ) + bias[n]

A few tokens, as when a model writes text, are multiplied by table look-up (see lut.cpp): the weights are read from
memory in their few bits, and a look-up does the work of several multiplications. Many tokens, as in a prompt, are
multiplied by the decoded weights, a slice of the rows at a time, which never needs the whole dense matrix.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from penjing.compiled import kernel
from penjing.numerics.activations import InputScale
from penjing.numerics.packing import pack_bits
from penjing.representations import BinaryCoded, Representation, Scheme
from penjing.runtime.coded_linear import CodedLinear

BLOCK = 16
"""Rows that lie together in memory."""

WORD = 32
"""Inputs whose signs share a word."""

MOST_TOKENS = 8
"""Up to so many tokens, looking up is faster than decoding."""

_SLICE = 1 << 17
"""Decoded weights at a time: half a megabyte, which stays in the cache."""

_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class _Matrix(ctypes.Structure):
    """`Matrix` of lut.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "columns", "width", "groups", "planes")),
        *((name, ctypes.c_int64) for name in ("alpha_type", "offset_type")),
        *((name, ctypes.c_void_p) for name in ("words", "alpha", "offset")),
    )


class _Ready:
    """What a call needs, looked up once: the kernel, where the tensors lie, and what keeps them there."""

    def __init__(self, module: LUTLinear, library: ctypes.CDLL) -> None:
        grid, offset = module.grid, module.offset
        self.rows, self.columns, self.bias = module.out_features, module.in_features, module.bias
        self.held = (module.words, module.alpha, offset)
        self.matrix = _Matrix(
            self.rows,
            self.columns,
            grid.columns_per_group(self.columns),
            grid.groups(self.columns),
            grid.bits,
            _TYPES[module.alpha.dtype],
            0 if offset is None else _TYPES[offset.dtype],
            module.words.data_ptr(),
            module.alpha.data_ptr(),
            None if offset is None else offset.data_ptr(),
        )
        self.address = ctypes.addressof(self.matrix)
        self.multiply, self.decode = library.lut_multiply, library.lut_decode
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
        blocks = max(_SLICE // self.columns // BLOCK, 1)
        scratch = torch.empty(blocks * BLOCK * self.columns)
        for first in range(0, -(-self.rows // BLOCK), blocks):
            start, stop = first * BLOCK, min((first + blocks) * BLOCK, self.rows)
            count = -(-(stop - start) // BLOCK)
            values = scratch[: count * BLOCK * self.columns].view(self.columns, -1)
            self.decode(self.address, values.data_ptr(), first, count, torch.get_num_threads())
            torch.mm(x, values[:, : stop - start], out=y[:, start:stop])


class LUTLinear(CodedLinear):
    """A linear with `weight` (N, K) as packed bit planes; not trainable.

    weight      binary-coded
    bias        (N,), or None
    transposed  the `weight` that it shows is (K, N), as in GPT-2's `Conv1D`

    Computes in fp32 and answers in the dtype of its input. Needs a kernel and a CPU to be fast; on another device,
    or where a gradient is wanted, it multiplies by the decoded weights.
    """

    words: Tensor
    alpha: Tensor
    offset: Tensor | None
    bias: Tensor | None

    def __init__(self, weight: BinaryCoded, bias: Tensor | None = None, *, transposed: bool = False) -> None:
        super().__init__()
        self.grid, self.transposed = weight.grid, transposed
        self.out_features, self.in_features = weight.shape
        self.register_buffer("words", pack_words(weight))
        self.register_buffer("alpha", _in_blocks(weight.alpha))
        self.register_buffer("offset", None if weight.offset is None else _in_blocks(weight.offset.unsqueeze(-1)))
        self.register_buffer("bias", bias)
        self._ready: _Ready | None = None

    @property
    def weight(self) -> Tensor:
        """The decoded weights, fp32, computed anew, as a dense module would hold them."""
        values = unpacked(self).dense()
        return values.T.contiguous() if self.transposed else values

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        ready = self._ready or self._prepare()
        if ready is None or x.device.type != "cpu" or (x.requires_grad and torch.is_grad_enabled()):
            bias = None if self.bias is None else self.bias.to(x.dtype)
            return linear(x, unpacked(self).dense().to(x.dtype), bias)
        given = x if x.dtype == torch.float32 and x.is_contiguous() else x.float().contiguous()
        y = torch.empty((*x.shape[:-1], self.out_features))
        tokens = x.numel() // self.in_features
        (ready.look_up if tokens <= MOST_TOKENS else ready.decode_and_multiply)(given, y, tokens)
        if ready.bias is not None:
            y += ready.bias
        return y if x.dtype == torch.float32 else y.to(x.dtype)

    def _prepare(self) -> _Ready | None:
        library = kernel("lut.cpp") if self.words.device.type == "cpu" else None
        if library is not None:
            self._ready = _Ready(self, library)
        return self._ready

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LUTLinear:
        """Tensors may move: their addresses are looked up again."""
        super()._apply(fn, recurse)
        self._ready = None
        return self

    def __getstate__(self) -> dict[str, Any]:
        """Without addresses, which mean nothing in a copy."""
        return self.__dict__ | {"_ready": None}

    def extra_repr(self) -> str:
        """For `print(model)`."""
        bias = self.bias is not None
        size = f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}"
        return f"{size}, weight=W{self.grid.bits} {self.grid.label}"


def pack_words(weight: BinaryCoded) -> Tensor:
    """Bit planes in the order of the kernel: int32 (N / 16, words of a row, planes, 16), rows and groups padded."""
    rows, columns = weight.shape
    width, groups = weight.grid.columns_per_group(columns), weight.grid.groups(columns)
    codes = pad(weight.codes, (0, groups * width - columns, 0, -rows % BLOCK))
    codes = pad(codes.reshape(-1, groups, width), (0, -width % WORD)).flatten(1)
    planes = [pack_bits(codes >> plane & 1, 1).view(torch.int32) for plane in range(weight.grid.bits)]
    stacked = torch.stack(planes, -1).unflatten(0, (-1, BLOCK))
    return stacked.permute(0, 2, 3, 1).contiguous()


def unpacked(module: LUTLinear) -> BinaryCoded:
    """What `module` was made from."""
    rows, columns, grid = module.out_features, module.in_features, module.grid
    width, groups = grid.columns_per_group(columns), grid.groups(columns)
    bit = torch.arange(WORD, dtype=torch.int32, device=module.words.device)
    codes = torch.zeros(-(-rows // BLOCK) * BLOCK, module.words.shape[1], WORD, dtype=torch.uint8, device=bit.device)
    for plane in range(grid.bits):
        words = module.words[:, :, plane].transpose(1, 2).flatten(0, 1).unsqueeze(-1)
        codes |= ((words >> bit) & 1).to(torch.uint8) << plane
    codes = codes.reshape(len(codes), groups, -1)[:, :, :width].flatten(1)[:rows, :columns]
    alpha = module.alpha.permute(0, 3, 1, 2).flatten(0, 1)[:rows]
    offset = None if module.offset is None else module.offset.permute(0, 3, 1, 2).flatten(0, 1)[:rows, :, 0]
    return BinaryCoded(codes.contiguous(), alpha.contiguous(), offset, grid)


def runner(layer: nn.Module, scheme: Scheme, weight: Representation, static: InputScale | None) -> nn.Module | None:
    """The look-up linear for a live `layer`; None for other weights, off the CPU, and where no kernel can be built."""
    if not isinstance(weight, BinaryCoded) or scheme.activations is not None:
        return None
    # The layer may still be without memory (meta) while its weights are read; scales come as they were read.
    if weight.alpha.device.type != "cpu" or kernel("lut.cpp") is None:
        return None
    bias = layer._parameters.get("bias")
    return LUTLinear(weight, None if bias is None else bias.detach(), transposed=not isinstance(layer, nn.Linear))


def _in_blocks(per_group: Tensor) -> Tensor:
    """(N, G, n) -> (N / 16, G, n, 16)."""
    padded = pad(per_group, (0, 0, 0, 0, 0, -len(per_group) % BLOCK))
    return padded.reshape(-1, BLOCK, *per_group.shape[1:]).permute(0, 2, 3, 1).contiguous()
