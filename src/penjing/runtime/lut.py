"""Linears of binary-coded weights that multiply by looking up (LUT-GEMM, arXiv:2206.09557).

    y[n] = sum_g ( sum_i alpha[n, g, i] sum_{k in g} b_i[n, k] x[k] + offset[n, g] sum_{k in g} x[k] ) + bias[n]

where x has been multiplied by a factor per input first if the weight has such (OneBit). See lut.cpp for the kernel.
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
from penjing.numerics.packing import pack_bits
from penjing.representations import BinaryCoded, Representation, Scheme
from penjing.runtime.look_up import TYPES, Kernel, LookUpLinear, detached_bias

BLOCK = 16
"""Rows that lie together in memory."""

WORD = 32
"""Inputs whose signs share a word."""


class _Matrix(ctypes.Structure):
    """`Matrix` of lut.cpp."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("rows", "columns", "width", "groups", "planes")),
        *((name, ctypes.c_int64) for name in ("alpha_type", "offset_type")),
        *((name, ctypes.c_void_p) for name in ("words", "alpha", "offset")),
    )


class LUTLinear(LookUpLinear):
    """A linear with `weight` (N, K), binary-coded, as packed bit planes; see `LookUpLinear`."""

    words: Tensor
    alpha: Tensor
    offset: Tensor | None

    def __init__(self, weight: BinaryCoded, bias: Tensor | None = None, *, transposed: bool = False) -> None:
        super().__init__(weight.shape, bias, transposed=transposed, inputs=weight.inputs)
        self.grid = weight.grid
        self.register_buffer("words", pack_words(weight))
        self.register_buffer("alpha", _in_blocks(weight.alpha))
        self.register_buffer("offset", None if weight.offset is None else _in_blocks(weight.offset.unsqueeze(-1)))

    def decoded(self) -> Tensor:
        """The weights (N, K) in fp32."""
        return unpacked(self).dense()

    def kernel(self) -> Kernel | None:
        """That of lut.cpp."""
        library = kernel("lut.cpp") if self.words.device.type == "cpu" else None
        if library is None:
            return None
        rows, columns, grid, offset = self.out_features, self.in_features, self.grid, self.offset
        matrix = _Matrix(
            rows,
            columns,
            grid.columns_per_group(columns),
            grid.groups(columns),
            grid.bits,
            TYPES[self.alpha.dtype],
            0 if offset is None else TYPES[offset.dtype],
            self.words.data_ptr(),
            self.alpha.data_ptr(),
            None if offset is None else offset.data_ptr(),
        )
        held = (self.words, self.alpha, offset)
        return Kernel(matrix, held, library.lut_multiply, library.lut_decode, rows, columns, BLOCK)

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
    return BinaryCoded(codes.contiguous(), alpha.contiguous(), offset, grid, inputs=module.inputs)


def runner(
    layer: nn.Module, scheme: Scheme, weight: Representation, static: InputScale | None
) -> Callable[[], nn.Module] | None:
    """What makes the look-up linear for a live `layer`.

    None for other weights and groups of scattered inputs, off the CPU, and where no kernel can be built.
    """
    if not isinstance(weight, BinaryCoded) or weight.group_index is not None or scheme.activations is not None:
        return None
    # The layer may still be without memory (meta) while its weights are read; scales come as they were read.
    if weight.alpha.device.type != "cpu" or kernel("lut.cpp") is None:
        return None
    return partial(LUTLinear, weight, detached_bias(layer), transposed=not isinstance(layer, nn.Linear))


def _in_blocks(per_group: Tensor) -> Tensor:
    """(N, G, n) -> (N / 16, G, n, 16)."""
    padded = pad(per_group, (0, 0, 0, 0, 0, -len(per_group) % BLOCK))
    return padded.reshape(-1, BLOCK, *per_group.shape[1:]).permute(0, 2, 3, 1).contiguous()
