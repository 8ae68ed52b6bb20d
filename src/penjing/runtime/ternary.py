"""Linears of ternary weights that multiply by looking up three inputs at once.

    y[n] = sum_g scale[n, g] sum_{k in g} t[n, k] x[k]  +  bias[n]        t in {-1, 0, +1}

Three codes have 27 values, which take 5 bits: 1.67 bits per weight, 1.78 with six triples in a word of 32 bits, and 2
where groups of 128 end in the middle of a word. Inputs stay as they are: the product is that of the decoded weights, up
to the order of summation. See ternary.cpp for the kernel.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from penjing.compiled import kernel
from penjing.numerics.activations import InputScale
from penjing.numerics.ternary import TernaryGrid
from penjing.representations import Quantized, Representation, Scheme
from penjing.runtime.look_up import TYPES, Kernel, LookUpLinear, detached_bias

BLOCK = 64
"""Rows that lie together in memory."""

WORD, TRIPLE = 18, 3
"""Inputs whose codes share a word, and a look-up."""

_DIGITS = torch.tensor([1, 3, 9], dtype=torch.int32)


class _Matrix(ctypes.Structure):
    """`Matrix` of ternary.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "columns", "width", "groups", "scale_type")),
        *((name, ctypes.c_void_p) for name in ("words", "scale")),
    )


class TernaryLinear(LookUpLinear):
    """A linear with `weight` (N, K) on a `TernaryGrid`, in consecutive groups; see `LookUpLinear`."""

    words: Tensor
    scale: Tensor

    def __init__(self, weight: Quantized, bias: Tensor | None = None, *, transposed: bool = False) -> None:
        super().__init__(weight.shape, bias, transposed=transposed)
        assert isinstance(weight.grid, TernaryGrid)
        self.grid = weight.grid
        self.register_buffer("words", pack_words(weight))
        scale = pad(weight.scale, (0, 0, 0, -len(weight.scale) % BLOCK))
        self.register_buffer("scale", scale.unflatten(0, (-1, BLOCK)).transpose(1, 2).contiguous())

    def decoded(self) -> Tensor:
        """The weights (N, K) in fp32."""
        codes = unpack_words(self.words, (self.out_features, self.in_features), self.grid)
        scale = self.scale.transpose(1, 2).flatten(0, 1)[: self.out_features]
        return codes.float() * self.grid.spread(scale.float(), self.in_features)

    def kernel(self) -> Kernel | None:
        """That of ternary.cpp."""
        library = kernel("ternary.cpp") if self.words.device.type == "cpu" else None
        if library is None:
            return None
        rows, columns = self.out_features, self.in_features
        width, groups = self.grid.columns_per_group(columns), self.grid.groups(columns)
        places = self.words.data_ptr(), self.scale.data_ptr()
        matrix = _Matrix(rows, columns, width, groups, TYPES[self.scale.dtype], *places)
        functions = library.ternary_multiply, library.ternary_decode
        return Kernel(matrix, (self.words, self.scale), *functions, rows, columns, BLOCK)

    def extra_repr(self) -> str:
        """For `print(model)`."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={bias}, {self.grid.label}"


def pack_words(weight: Quantized) -> Tensor:
    """Codes in the order of the kernel: int32 (N / 64, words of a row, 64), rows and groups padded with zeros."""
    rows, columns = weight.shape
    width, groups = weight.grid.columns_per_group(columns), weight.grid.groups(columns)
    codes = pad(weight.codes, (0, groups * width - columns, 0, -rows % BLOCK)).reshape(-1, groups, width)
    digits = pad(codes, (0, -width % WORD)).to(torch.int32) + 1
    triples = (digits.unflatten(-1, (-1, TRIPLE)) * _DIGITS).sum(-1, dtype=torch.int32).unflatten(-1, (-1, 6))
    words = (triples << (5 * torch.arange(6, dtype=torch.int32))).sum(-1, dtype=torch.int32).flatten(1)
    return words.unflatten(0, (-1, BLOCK)).transpose(1, 2).contiguous()


def unpack_words(words: Tensor, shape: tuple[int, int], grid: TernaryGrid) -> Tensor:
    """The inverse of `pack_words`: codes int8 of `shape` (N, K)."""
    rows, columns = shape
    width, groups = grid.columns_per_group(columns), grid.groups(columns)
    flat = words.transpose(1, 2).flatten(0, 1).unsqueeze(-1)
    triples = flat >> (5 * torch.arange(6, dtype=torch.int32, device=words.device)) & 31
    digits = triples.unsqueeze(-1) // _DIGITS.to(words.device) % 3 - 1
    codes = digits.to(torch.int8).reshape(len(flat), groups, -1)[:, :, :width].flatten(1)
    return codes[:rows, :columns].contiguous()


def runner(
    layer: nn.Module, scheme: Scheme, weight: Representation, static: InputScale | None
) -> Callable[[], nn.Module] | None:
    """What makes the ternary linear for a live `layer`.

    None for other weights, where inputs are rounded, off the CPU, and where no kernel can be built.
    """
    if not isinstance(weight, Quantized) or not isinstance(weight.grid, TernaryGrid) or weight.group_index is not None:
        return None
    if scheme.activations is not None or weight.scale.device.type != "cpu" or kernel("ternary.cpp") is None:
        return None
    return partial(TernaryLinear, weight, detached_bias(layer), transposed=not isinstance(layer, nn.Linear))
