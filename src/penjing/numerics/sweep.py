"""The column sweep of GPTQ and SparseGPT: fix one column, let the columns after it absorb the error.

With U the factor of `penjing.numerics.cholesky` and w_i column i as the sweep finds it,

    v_i = replace(w_i)        e_i = (w_i - v_i) / U[i, i]        w_j -= e_i U[i, j]   for all j > i

which is the optimal move of the free columns for the loss (W - V) H (W - V)^T. Each fixed column adds
|e_i|**2 to that loss, nothing else does. Updates of far columns are batched:

            start      i         stop                 K
    ----------+--------+----------+-------------------+
      fixed   |  done  |  rank-1  |  one matrix       |
              |        |  updates |  product per block|
    ----------+--------+----------+-------------------+

so that inside a block, and at the first column of a block, every column up to `stop` is current. Columns are the
rows of the working matrix (K, N): contiguous in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import pairwise

import torch
from torch import Tensor

Replace = Callable[[int, Tensor], Tensor]
"""Column number and its current values (N,) -> the values (N,) it is fixed at."""


def block_bounds(columns: int, block_size: int, starts: Iterable[int] = ()) -> list[int]:
    """Cut `columns` into blocks of at most `block_size`: [0, ..., columns].

    A segment that begins at one of `starts` (the first column of a group, say) never lies across a cut, unless
    it begins a block: then it is current as a whole when the sweep reaches it.
    """
    allowed = sorted({0, columns, *starts})
    bounds = [0]
    while bounds[-1] < columns:
        start = bounds[-1]
        stop = min(start + block_size, columns)
        inside = [cut for cut in allowed if start < cut <= stop]
        reaches = stop in allowed or not inside
        bounds.append(stop if reaches else inside[-1])
    return bounds


def sweep(
    columns: Tensor,
    factor: Tensor,
    bounds: list[int],
    replace: Replace,
    begin_block: Callable[[int, int], None] = lambda start, stop: None,
) -> None:
    """Fix all columns in order, in place: `columns` (K, N) ends up holding what `replace` returned.

    factor       U, upper (K, K)
    bounds       of the blocks, from `block_bounds`
    replace      fixes one column; may read `columns` up to the end of the block
    begin_block  called with (start, stop) before the first column of each block
    """
    pivots = factor.diagonal().tolist()
    for start, stop in pairwise(bounds):
        begin_block(start, stop)
        errors = torch.empty_like(columns[start:stop])
        for position in range(start, stop):
            column, error = columns[position], errors[position - start]
            fixed = replace(position, column)
            torch.sub(column, fixed, out=error).div_(pivots[position])
            column.copy_(fixed)
            columns[position + 1 : stop].addr_(factor[position, position + 1 : stop], error, alpha=-1)
        columns[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
