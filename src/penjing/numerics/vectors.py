"""Additive codebooks of short vectors: d weights are a row's scale times a sum of one entry of each book."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class VectorGrid:
    """M books of 2**book_bits vectors of `dimension` numbers, for a whole matrix; a scale per row.

    M * book_bits / dimension bits per weight, and what books and scales take.
    """

    books: int
    book_bits: int
    dimension: int
    table_dtype: torch.dtype = torch.bfloat16

    @property
    def bits(self) -> int:
        """Bits per weight, rounded."""
        return max(round(self.books * self.book_bits / self.dimension), 1)

    @property
    def group_size(self) -> None:
        """Scales are per row."""
        return None

    @property
    def label(self) -> str:
        return f"{self.books}x{self.book_bits} bits for {self.dimension} weights"

    def runs(self, columns: int) -> int:
        """Vectors in a row; the last may be cut."""
        return -(-columns // self.dimension)

    def decode(self, codes: Tensor, books: Tensor, scale: Tensor) -> Tensor:
        """What codes (N, G, M) stand for: (N, G * d)."""
        total = torch.zeros(*codes.shape[:2], self.dimension, dtype=books.dtype)
        for book in range(self.books):
            total += books[book][codes[:, :, book].long()]
        return total.flatten(1) * scale
