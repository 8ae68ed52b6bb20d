"""Weight sharing: every weight becomes one of a few values, chosen for the weights that share them.

    minimise  sum_nk h_k (w_nk - t[c_nk])^2        over tables t of 2**bits values and codes c

one table per output row, per group of inputs, or for the whole matrix. h_k is the mean square of input k, so that the
error counts as it does in the output when inputs are independent; without `weighted` it is 1. The tables are the best
there are: one-dimensional k-means is solved exactly (see `numerics.kmeans`), so no start has to be guessed and none
is unlucky.

With `compensate` the columns are then fixed in turn as in GPTQ, each to the nearest entries of these tables, and the
columns after it make up for the error. With `huffman` codes are stored with as many bits as they are frequent.

Worked example, 1 bit, one row: W = [1, 2, 6, 8], h = 1: the best cut is after 2, t = [1.5, 7], c = [0, 0, 1, 1], error
.5 + 2 = 2.5. With h = [1, 9, 1, 1] the table is [1.9, 7].

Source: Han, Mao, Dally 2016, "Deep Compression" (arXiv:1510.00149), whose k-means starts from evenly spaced values;
Kim et al. 2024, "SqueezeLLM" (arXiv:2306.07629), for tables per row and weights by sensitivity.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from penjing.methods.base import GroupSize, LinearInput, Options
from penjing.methods.quantization.gptq import visiting_order
from penjing.numerics.cholesky import dead_columns, inverse_factor
from penjing.numerics.codebooks import CodebookGrid, nearest
from penjing.numerics.sweep import block_bounds, sweep
from penjing.representations import Codebook, Masked, Scheme
from penjing.statistics import ColumnNorm, Gram, StatisticType


class KMeansOptions(Options):
    """Recipe keys of weight sharing."""

    bits: int = Field(4, ge=1, le=8, description="bits per code: 2**bits values per table")
    group_size: GroupSize = Field(
        "channel", description="consecutive inputs that share a table; `channel` (or -1): the row; `tensor`: the matrix"
    )
    weighted: bool = Field(True, description="errors count by the mean square of their input")
    compensate: bool = Field(False, description="later columns make up for the error, as in gptq")
    damping: float = Field(
        0.01, ge=0, description="of `compensate`: added to the Hessian's diagonal, relative to its mean"
    )
    huffman: bool = Field(False, description="store frequent codes in fewer bits; the size depends on the weights")

    def grid(self, storage_dtype: torch.dtype) -> CodebookGrid:
        """The grid these keys describe."""
        size = None if self.group_size == "channel" else self.group_size
        return CodebookGrid(self.bits, size, storage_dtype, self.huffman)

    def scheme(self, before: Scheme, storage_dtype: torch.dtype) -> Scheme:
        return replace(before, grid=self.grid(storage_dtype))


def kmeans(
    weight: Tensor, grid: CodebookGrid, *, importance: Tensor | None = None, kept: Tensor | None = None
) -> Codebook | Masked:
    """`weight` (N, K) as nearest entries of the best tables.

    importance  (K,), not negative: what a squared error at this input costs; None: the same everywhere
    kept        bool (N, K): weights outside become exactly zero and do not count
    """
    tables = grid.fit(weight, _counting(weight, importance, kept))
    return _masked(Codebook(grid.encode(weight, tables), tables, grid), kept)


def kmeans_compensated(
    weight: Tensor,
    gram: Tensor,
    grid: CodebookGrid,
    *,
    importance: Tensor | None = None,
    damping: float = 0.01,
    kept: Tensor | None = None,
) -> Codebook | Masked:
    """The same tables, with columns fixed in turn, the most active first, given `gram` (K, K) of the inputs."""
    tables = grid.fit(weight, _counting(weight, importance, kept)).float()
    width = grid.columns_per_group(weight.shape[1])
    visited = visiting_order(gram.diagonal(), width, "activation")
    factor, _ = inverse_factor(gram[visited][:, visited], damping)
    current = weight.float().masked_fill(dead_columns(gram), 0)[:, visited].T.contiguous()
    mask = None if kept is None else kept[:, visited].T
    codes = torch.empty(weight.shape[::-1], dtype=torch.uint8)
    places = visited.tolist()

    def fix(position: int, column: Tensor) -> Tensor:
        table = tables[:, places[position] // width].expand(len(column), -1)
        code = nearest(column.unsqueeze(1), table)
        codes[places[position]] = code.squeeze(1)
        value = table.gather(1, code.long()).squeeze(1)
        return value if mask is None else value * mask[position]

    sweep(current, factor, block_bounds(len(current), 128), fix)
    return _masked(Codebook(codes.T.contiguous(), tables.to(grid.table_dtype), grid), kept)


def linear(given: LinearInput, options: KMeansOptions) -> Codebook | Masked:
    """Share the values of one linear, or of the stacked rows of several that have tables of their own."""
    grid = options.grid(given.storage_dtype)
    importance = given.statistics[ColumnNorm].value if options.weighted else None
    if not options.compensate:
        return kmeans(given.weight, grid, importance=importance, kept=given.kept)
    gram = given.statistics[Gram].value
    return kmeans_compensated(given.weight, gram, grid, importance=importance, damping=options.damping, kept=given.kept)


def needs(options: KMeansOptions) -> tuple[StatisticType, ...]:
    """What the error is weighted by, and what compensates it."""
    weighted: tuple[StatisticType, ...] = (ColumnNorm,) if options.weighted else ()
    return (*weighted, Gram) if options.compensate else weighted


def _counting(weight: Tensor, importance: Tensor | None, kept: Tensor | None) -> Tensor | None:
    """What an error costs at each weight, (N, K); an input that was never active counts a little, in case it comes."""
    if importance is not None:
        importance = importance + 1e-6 * importance.mean().clamp(min=torch.finfo(torch.float32).tiny)
    if kept is None:
        return importance
    return kept * (1.0 if importance is None else importance)


def _masked(values: Codebook, kept: Tensor | None) -> Codebook | Masked:
    return values if kept is None else Masked(values, kept)
