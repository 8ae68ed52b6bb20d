"""Rounding a column so that the errors of different outputs make up for each other, too.

A sweep (see `penjing.numerics.sweep`) leaves an error f_j = w_j - v_j of every column j, with w_j as the sweep finds
it, and its loss is the sum of |f_j|^2 / U[j, j]^2: it counts outputs apart, and all alike. What comes after a linear
does not. With G (N, N), the sum of outer products of the gradients that reach its outputs, errors cost

    tr(G (W - V) H (W - V)^T) = sum_j f_j^T G f_j / U[j, j]^2

so that every column is a problem of its own, of the kind that a row is to the sweep, and is solved in the same way:
with R upper, G^-1 = R^T R, t = w_j at first, and outputs i = 0, 1, ... in some order,

    v_i = round(t_i)      e_i = (t_i - v_i) / R[i, i]      t_k -= e_i R[i, k]   for k > i

What t became is forgotten with the column; the sweep goes on from w_j - v_j. G is estimated from far fewer independent
numbers than H, so it is damped more, and outputs far apart in a wide matrix are taken for independent: G has blocks.

Worked example. w = [0.6, 0.8] and G = [[2, 1], [1, 1]], undamped, the outputs in their order: the numbers of GPTQ's
worked example (see `penjing.methods.quantization.gptq`), so v = [1, 0] with loss 0.32, where rounding to nearest gives
[1, 1] with loss 0.52.

Source: Tseng, Sun, De Sa 2025, "Model-Preserving Adaptive Rounding" (arXiv:2505.22988): a Hessian of the predictions'
divergence as a product of two factors, and rounding with feedback from both sides; in the order of GPTQ's sweep.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

from penjing.compiled import helper
from penjing.numerics.cholesky import inverse_factor
from penjing.numerics.grids import IntegerGrid

DAMPING = 0.2
"""Of G, relative to its mean diagonal."""

OUTPUTS_TOGETHER = 1536
"""Outputs in a block of G: bounds what is kept of a wide matrix, and the time, which grows with its square."""


def output_bounds(outputs: int) -> list[int]:
    """Cuts of that many outputs into nearly equal blocks: [0, ..., outputs]."""
    count = -(-outputs // OUTPUTS_TOGETHER)
    return [number * outputs // count for number in range(count + 1)]


class OutputFeedback:
    """Rounds columns (N,) of a matrix to an integer grid.

    grams  blocks along the diagonal of G, from the first output to the last; fp32 (n, n), of any multiple
    """

    def __init__(self, grams: Sequence[Tensor], grid: IntegerGrid) -> None:
        self._grid = grid
        starts = accumulate((len(gram) for gram in grams), initial=0)
        self._blocks = [_Block(gram, start) for gram, start in zip(grams, starts, strict=False)]
        self._library = helper("output_feedback.cpp", "penjing.numerics")

    def encode(self, column: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """Codes (N,) of a column, all fp32 (N,). Where the scale is zero, the code is the zero point."""
        if self._grid.offset:
            column, zero = column - zero, torch.full_like(zero, self._grid.low)
        codes = torch.empty_like(column)
        fill = self._in_python if self._library is None else self._compiled
        for block in self._blocks:
            fill(block, column, scale, zero, codes)
        return codes

    def _compiled(self, block: _Block, column: Tensor, scale: Tensor, zero: Tensor, codes: Tensor) -> None:
        assert self._library is not None
        tensors = (column, scale, zero, block.order, block.factor, codes)
        pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in tensors]
        limits = ctypes.c_float(self._grid.low), ctypes.c_float(self._grid.high)
        self._library.round_with_feedback(*pointers, ctypes.c_int64(len(block.order)), *limits)

    def _in_python(self, block: _Block, column: Tensor, scale: Tensor, zero: Tensor, codes: Tensor) -> None:
        free, pivots = column[block.order], block.factor.diagonal().tolist()
        scales, zeros = scale[block.order].tolist(), zero[block.order].tolist()
        for place, (output, step, shift) in enumerate(zip(block.order.tolist(), scales, zeros, strict=True)):
            wanted = float(free[place])
            code = min(max(round(wanted / step + shift), self._grid.low), self._grid.high) if step else shift
            codes[output] = code
            error = (wanted - step * (code - shift)) / pivots[place]
            free[place + 1 :].add_(block.factor[place, place + 1 :], alpha=-error)


class _Block:
    """Outputs whose errors make up for each other.

    order   their numbers int64 (n,), those that matter most first
    factor  R of the damped G, in that order, fp32 (n, n)
    """

    def __init__(self, gram: Tensor, start: int) -> None:
        order = gram.diagonal().argsort(descending=True, stable=True)
        known = gram if gram.any() else torch.eye(len(gram))  # no gradient says that outputs are apart
        self.factor = inverse_factor(known[order][:, order], DAMPING)[0].contiguous()
        self.order = order + start
