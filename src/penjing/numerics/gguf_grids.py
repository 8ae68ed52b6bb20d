"""The grids of GGUF's types: what every type of llama.cpp can say, as grids that any method rounds to.

A block is 32 consecutive inputs with a 16-bit scale, or a super-block of 256: groups of 16 or 32 whose scales (and
minima) are whole numbers times one 16-bit number of the super-block.

    type     bits  group  scale             minimum          bits per weight
    q4_0     4     32     fp16, any sign    none             4.5
    q4_1     4     32     fp16              fp16             5
    q5_0     5     32     fp16, any sign    none             5.5
    q5_1     5     32     fp16              fp16             6
    q8_0     8     32     fp16              none             8.5
    iq4_nl   4     32     fp16, any sign    none             4.5        16 unevenly spaced values
    q6_k     6     16     8 bits, any sign  none             6.5625
    q5_k     5     32     6 bits            6 bits           5.5
    q4_k     4     32     6 bits            6 bits           4.5
    q3_k     3     16     6 bits, any sign  none             3.4375
    q2_k     2     16     4 bits            4 bits           2.625
    tq2_0    2     256    fp16, any sign    none             2.0625     all four codes, not only the three of its name
    tq1_0    -     256    fp16, any sign    none             1.6875     -1, 0 and 1

(Sources: ggml's `ggml-common.h`, and the readers of the gguf package.)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from penjing.numerics.float_grids import FloatGrid, ScaledGrid
from penjing.numerics.grids import IntegerGrid
from penjing.numerics.ternary import TernaryGrid

_HALF = torch.float16

GGUF_GRIDS: Mapping[str, ScaledGrid] = {
    "q4_0": IntegerGrid(4, 32, True, "signed-max", _HALF),
    "q4_1": IntegerGrid(4, 32, False, scale_dtype=_HALF, zero="minimum"),
    "q5_0": IntegerGrid(5, 32, True, "signed-max", _HALF),
    "q5_1": IntegerGrid(5, 32, False, scale_dtype=_HALF, zero="minimum"),
    "q8_0": IntegerGrid(8, 32, True, "narrow", _HALF),
    "iq4_nl": FloatGrid("iq4_nl", 32, "plain", _HALF),
    "q6_k": IntegerGrid(6, 16, True, "signed-max", _HALF, scale_bits=8),
    "q5_k": IntegerGrid(5, 32, False, "full", _HALF, "minimum", scale_bits=6),
    "q4_k": IntegerGrid(4, 32, False, "full", _HALF, "minimum", scale_bits=6),
    "q3_k": IntegerGrid(3, 16, True, "signed-max", _HALF, scale_bits=6),
    "q2_k": IntegerGrid(2, 16, False, "full", _HALF, "minimum", scale_bits=4),
    "tq2_0": IntegerGrid(2, 256, True, "signed-max", _HALF),
    "tq1_0": TernaryGrid(2, 256, True, "full", _HALF),
}
"""By the name that llama.cpp gives the type, in lower case."""
