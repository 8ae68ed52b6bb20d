"""Codebooks: a weight is the number of an entry in a small table of values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from penjing.numerics.grids import Grouped, group_label
from penjing.numerics.kmeans import exact_kmeans


@dataclass(frozen=True)
class CodebookGrid(Grouped):
    """Tables of 2**bits values.

    bits         per code, 1 to 8
    group_size   consecutive inputs of an output that share a table; None: the row; "tensor": the matrix
    table_dtype  of the entries
    huffman      codes (and the mask of removed weights) are stored with as many bits as they are frequent
    """

    bits: int
    group_size: int | Literal["tensor"] | None
    table_dtype: torch.dtype = torch.bfloat16
    huffman: bool = False

    @property
    def entries(self) -> int:
        return 2**self.bits

    @property
    def label(self) -> str:
        return f"{group_label(self.group_size)} codebook{', Huffman' if self.huffman else ''}"

    def tables_of(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Tables for a matrix of `shape` (N, K): (N, G), or (1, 1) for one in all."""
        return (1, 1) if self.group_size == "tensor" else (shape[0], self.groups(shape[1]))

    def spans(self, columns: int) -> list[slice]:
        """The inputs of each group."""
        width = self.columns_per_group(columns)
        return [slice(start, min(start + width, columns)) for start in range(0, columns, width)]

    def frequencies(self) -> Tensor:
        """How often each code is likely to occur, fp64 (2**bits,), before any weight is known.

        A row is taken for normally distributed; a matrix, whose rows differ in scale, for Laplace-distributed. The
        best tables of many entries have them as dense as the cube root of the density: as the quantiles of the same
        distribution stretched by the square root of 3 (normal) or by 3 (Laplace). Source: Panter, Dite 1951.
        """
        edges = torch.linspace(0, 1, self.entries + 1, dtype=torch.float64)
        if self.group_size == "tensor":
            side = (2 * edges - 1).abs()
            below = 0.5 + (2 * edges - 1).sign() * (1 - (1 - side) ** 3) / 2
        else:
            below = torch.special.ndtr(3**0.5 * torch.special.ndtri(edges))
        return below.diff()

    def fit(self, weight: Tensor, importance: Tensor | None = None) -> Tensor:
        """The best tables for `weight` (N, K): (N, G, 2**bits), or (1, 1, 2**bits), as stored.

        importance  (K,) or (N, K), not negative: what a squared error costs; removed weights cost nothing
        """
        weight = weight.float()
        if importance is not None:
            importance = importance.float().expand(weight.shape)
        if self.group_size == "tensor":
            flat = None if importance is None else importance.reshape(1, -1)
            return exact_kmeans(*_distinct(weight.reshape(1, -1), flat), self.entries).unsqueeze(0).to(self.table_dtype)
        tables = [
            exact_kmeans(weight[:, span], None if importance is None else importance[:, span], self.entries)
            for span in self.spans(weight.shape[1])
        ]
        return torch.stack(tables, 1).to(self.table_dtype)

    def encode(self, weight: Tensor, tables: Tensor) -> Tensor:
        """The number of the nearest entry for every weight, uint8 (N, K)."""
        weight = weight.float()
        codes = torch.empty(weight.shape, dtype=torch.uint8)
        for group, span in enumerate(self.spans(weight.shape[1])):
            codes[:, span] = nearest(weight[:, span], tables[:, group].float())
        return codes

    def decode(self, codes: Tensor, tables: Tensor) -> Tensor:
        """The entries that `codes` (N, K) name, fp32."""
        values = torch.empty(codes.shape)
        for group, span in enumerate(self.spans(codes.shape[1])):
            table = tables[:, group].float().expand(len(codes), -1)
            values[:, span] = table.gather(1, codes[:, span].long())
        return values


def nearest(values: Tensor, table: Tensor) -> Tensor:
    """Numbers, uint8, of the entries of `table` (R or 1, k) nearest to `values` (R, n); the lower at ties."""
    table, order = table.sort(1)
    middles = ((table[:, 1:].double() + table[:, :-1]) / 2).expand(len(values), -1).contiguous()
    place = torch.searchsorted(middles, values.double().contiguous())
    return order.expand(len(values), -1).gather(1, place).to(torch.uint8)


def _distinct(values: Tensor, importance: Tensor | None) -> tuple[Tensor, Tensor]:
    """The distinct ones of `values` (1, n) and what all that are equal cost together."""
    distinct, place = values.flatten().unique(return_inverse=True)
    weights = torch.ones(values.numel()) if importance is None else importance.flatten()
    total = torch.zeros(len(distinct), dtype=torch.float64).index_add_(0, place, weights.double())
    return distinct.unsqueeze(0), total.unsqueeze(0)
