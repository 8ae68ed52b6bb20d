"""Decoding Huffman codes: a compiled kernel, some hundred million symbols per second; numpy without a compiler."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from penjing.compiled import helper
from penjing.numerics import huffman
from penjing.numerics.huffman import Huffman


def decode(coded: Huffman) -> Tensor:
    """The symbols, uint8 (count,). Raises ValueError for a damaged stream."""
    library = helper("huffman.cpp", "penjing.runtime")
    if library is None:
        return huffman.decode(coded)
    stream, table = coded.stream.contiguous(), huffman.table(coded.lengths)
    starts = torch.nn.functional.pad(coded.sizes.long().cumsum(0), (1, 0)).contiguous()
    symbols = torch.empty(coded.count, dtype=torch.uint8)
    library.huffman_decode.restype = ctypes.c_int64
    damaged = library.huffman_decode(
        ctypes.c_void_p(stream.data_ptr()),
        ctypes.c_void_p(starts.data_ptr()),
        ctypes.c_void_p(table.ctypes.data),
        ctypes.c_int64(coded.count),
        ctypes.c_void_p(symbols.data_ptr()),
        ctypes.c_int(torch.get_num_threads()),
    )
    if damaged:
        raise ValueError("the stream holds no code somewhere, or ends too early")
    return symbols
