"""LLM.int8(): 8-bit weights and inputs, except for the few input columns that carry outliers.

Large models grow a few input columns with magnitudes far beyond all others. One scale per token would spend its 127
steps on them. So the product is split by columns O = {k: some |x_mk| of the batch >= threshold}:

    Y[m, n] = s[m] t[n] sum_{k not in O} A[m, k] B[n, k]  +  sum_{k in O} X[m, k] W'[n, k]

    t[n] = max_k |w_nk| / 127               B = round(W / t)                W' = t B
    s[m] = max_{k not in O} |x_mk| / 127    A = round(X / s) outside O

The first sum is one of integers (`penjing.runtime.int8`), the second has a handful of columns. The weights are rounded
to nearest and need no calibration; which columns are outliers is decided while the model runs. The second sum takes the
rounded weights, as released code does in inference; the paper keeps those columns in fp16.

Worked example, threshold 6: the token x = (0.5, -1, 60) and the weights w = (1.27, 0.5, 0.1) have O = {2}, s = 1 / 127,
A = (64, -127, -), t = 0.01, B = (127, 50, 10). The first sum is (64 * 127 - 127 * 50) / 12700 = 0.14, the second
60 * 0.1 = 6, together 6.14; exactly it is 6.135. With one scale for all three, 60 / 127, A is (1, -2, 127): all that is
left of the first two inputs is their order of magnitude.

Source: Dettmers et al. 2022 (arXiv:2208.07339), sections 2.2 and 3.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field

from penjing.methods.base import LinearInput, Options
from penjing.methods.quantization.rtn import rtn
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Activations, Masked, Quantized, Scheme


class LLMInt8Options(Options):
    """Recipe keys of LLM.int8()."""

    threshold: float = Field(6.0, gt=0, description="columns of a batch that reach this magnitude are not rounded")

    def grid(self, scale_dtype: torch.dtype) -> IntegerGrid:
        """8 bits, symmetric, one scale per output."""
        return IntegerGrid(8, None, True, "narrow", scale_dtype)

    def scheme(self, before: Scheme, storage_dtype: torch.dtype) -> Scheme:
        return replace(before, grid=self.grid(storage_dtype), activations=Activations(threshold=self.threshold))


def linear(given: LinearInput, options: LLMInt8Options) -> Quantized | Masked:
    """Round one linear, or the stacked rows of several; inputs are rounded at run time."""
    return rtn(given.weight, options.grid(given.storage_dtype), kept=given.kept)
