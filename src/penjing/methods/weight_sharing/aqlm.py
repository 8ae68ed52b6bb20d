"""Additive codebooks: a few consecutive weights are a sum of vectors from books that the whole matrix shares.

    w_n[g] ~ s_n sum_m C_m[b_ngm]        minimise  tr (W - V) H (W - V)^T,   H = X X^T

Books start from k-means on what the books before leave over. Then three steps take turns, none of which raises the
loss:

    codes   run by run and book by book, every row takes the entry that is best with all its other codes as they are
    books   least squares for all entries at once, by conjugate gradients: the loss is quadratic in them
    scales  per row, least squares again

and codes have the last word, for books and scales as they are stored.

Worked example, one row, runs of 2, one book of two entries, H = I: W = [1, 2, 1, 2, -1, 0]: C = {[1, 2], [-1, 0]} and
b = 0, 0, 1 is exact. With H = [[1, 0], [0, 0]] in every run the second number of an entry may be anything.

Source: Egiazarian et al. 2024, "Extreme Compression of Large Language Models via Additive Quantization"
(arXiv:2401.06118); they search codes with a beam, train books by Adam, and whole blocks afterwards.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from penjing.methods.base import LinearInput, Options
from penjing.numerics.cholesky import dead_columns
from penjing.numerics.vectors import VectorGrid
from penjing.representations import Scheme, VectorCoded
from penjing.statistics import Gram

_SEEN = 1 << 14
"""Vectors that k-means looks at."""


class AQLMOptions(Options):
    """Recipe keys of additive codebooks."""

    books: int = Field(2, ge=1, le=8, description="entries that are summed")
    book_bits: int = Field(8, ge=1, le=8, description="2**book_bits entries per book")
    dimension: int = Field(8, ge=2, le=32, description="consecutive weights that an entry covers")
    rounds: int = Field(3, ge=0, description="of codes, books and scales in turn")
    damping: float = Field(0.01, ge=0, description="added to the Hessian's diagonal, relative to its mean")
    seed: int = Field(0, ge=0, description="of the start of k-means")

    def grid(self, storage_dtype: torch.dtype) -> VectorGrid:
        """The grid these keys describe."""
        return VectorGrid(self.books, self.book_bits, self.dimension, storage_dtype)

    def scheme(self, before: Scheme, storage_dtype: torch.dtype) -> Scheme:
        if not before.dense:
            raise ValueError("books of vectors have no place for zeros or factors; make this the only step there")
        return replace(before, grid=self.grid(storage_dtype))


def aqlm(
    weight: Tensor, gram: Tensor, grid: VectorGrid, *, rounds: int = 3, damping: float = 0.01, seed: int = 0
) -> VectorCoded:
    """`weight` (N, K) by additive codebooks, given `gram` (K, K), the sum of outer products of its inputs."""
    columns = weight.shape[1]
    spare = grid.runs(columns) * grid.dimension - columns
    hessian = gram.float().clone()
    hessian.diagonal().add_(damping * hessian.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny))
    weight = torch.nn.functional.pad(weight.float().masked_fill(dead_columns(gram), 0), (0, spare))
    fit = _Fit(weight, torch.nn.functional.pad(hessian, (0, spare, 0, spare)), grid, seed)
    for _ in range(rounds):
        fit.improve_codes()
        fit.improve_books()
        fit.improve_scales()
    fit.store()
    fit.improve_codes()
    dtype = grid.table_dtype
    return VectorCoded(fit.codes, fit.books.to(dtype), fit.scale.to(dtype), grid, columns)


class _Fit:
    """Codes, books and scales of one matrix while they are improved; columns are padded to whole runs."""

    def __init__(self, weight: Tensor, hessian: Tensor, grid: VectorGrid, seed: int) -> None:
        self.weight, self.hessian, self.grid = weight, hessian, grid
        mean_square = weight.square().mean(1, keepdim=True)
        self.scale = mean_square.sqrt().clamp(min=torch.finfo(grid.table_dtype).tiny)
        rest = (weight / self.scale).unflatten(1, (-1, grid.dimension))
        self.codes = torch.zeros(*rest.shape[:2], grid.books, dtype=torch.uint8)
        generator = torch.Generator().manual_seed(seed)
        books = []
        for book in range(grid.books):
            entries, code = _kmeans(rest.flatten(0, 1), 2**grid.book_bits, generator)
            books.append(entries)
            self.codes[:, :, book] = code.reshape(rest.shape[:2]).to(torch.uint8)
            rest = rest - entries[code].reshape(rest.shape)
        self.books = torch.stack(books)

    def loss(self) -> float:
        """tr (W - V) H (W - V)^T."""
        error = self.weight - self.values()
        return float(((error @ self.hessian) * error).sum(dtype=torch.float64))

    def values(self) -> Tensor:
        """What codes, books and scales stand for now."""
        return self.grid.decode(self.codes, self.books, self.scale)

    def improve_codes(self) -> None:
        """Every code in turn, all rows at once: the entry that leaves the least loss."""
        size = self.grid.dimension
        slope = (self.weight - self.values()) @ self.hessian
        for run in range(self.codes.shape[1]):
            span = slice(run * size, (run + 1) * size)
            inside = self.hessian[span, span]
            for book in range(self.grid.books):
                entries, old = self.books[book], self.codes[:, run, book].long()
                current = entries[old] * self.scale
                aim = slope[:, span] + current @ inside  # as if this code added nothing
                energy = ((entries @ inside) * entries).sum(1)
                cost = self.scale.square() * energy - 2 * self.scale * (aim @ entries.T)
                best = cost.argmin(1)
                keep = cost.gather(1, best.unsqueeze(1)) >= cost.gather(1, old.unsqueeze(1))
                best = torch.where(keep.squeeze(1), old, best)
                slope -= (entries[best] * self.scale - current) @ self.hessian[span]
                self.codes[:, run, book] = best.to(torch.uint8)

    def improve_books(self, steps: int = 8) -> None:
        """Conjugate gradients on all entries."""
        residual = self._gather(self.weight - self.values())
        direction, size = residual.clone(), float(residual.square().sum())
        for _ in range(steps):
            if size == 0:
                return
            bent = self._gather(self.grid.decode(self.codes, direction, self.scale))
            along = float((direction * bent).sum())
            if along <= 0:
                return
            self.books += size / along * direction
            residual -= size / along * bent
            before, size = size, float(residual.square().sum())
            direction = residual + size / before * direction

    def _gather(self, error: Tensor) -> Tensor:
        """Half the slope of the loss by every entry, for an `error` (N, K): what `decode` transposed makes of it."""
        pulled = ((error @ self.hessian) * self.scale).unflatten(1, (-1, self.grid.dimension)).flatten(0, 1)
        found = torch.zeros_like(self.books)
        for book in range(self.grid.books):
            found[book].index_add_(0, self.codes[:, :, book].flatten().long(), pulled)
        return found

    def improve_scales(self) -> None:
        """The best scale of every row; where its values are all zero, the scale stays."""
        plain = self.values() / self.scale
        seen = plain @ self.hessian
        size = (seen * plain).sum(1, keepdim=True)
        best = (seen * self.weight).sum(1, keepdim=True) / size.clamp(min=torch.finfo(torch.float32).tiny)
        self.scale = torch.where((size > 0) & (best > torch.finfo(self.grid.table_dtype).tiny), best, self.scale)

    def store(self) -> None:
        """Round books and scales to what a file holds."""
        self.books = self.books.to(self.grid.table_dtype).float()
        self.scale = self.scale.to(self.grid.table_dtype).float()


def _kmeans(vectors: Tensor, count: int, generator: torch.Generator, rounds: int = 12) -> tuple[Tensor, Tensor]:
    """Lloyd's iterations on a sample of `vectors` (V, d): centres (count, d), and the nearest of each vector."""
    sample = vectors[torch.randperm(len(vectors), generator=generator)[:_SEEN]]
    centres = sample[torch.arange(count) % len(sample)].clone()
    for _ in range(rounds):
        nearest = _nearest(sample, centres)
        total = torch.zeros_like(centres).index_add_(0, nearest, sample)
        members = torch.bincount(nearest, minlength=count).unsqueeze(1)
        centres = torch.where(members > 0, total / members.clamp(min=1), centres)
    return centres, _nearest(vectors, centres)


def _nearest(vectors: Tensor, centres: Tensor) -> Tensor:
    parts = [(centres.square().sum(1) - 2 * part @ centres.T).argmin(1) for part in vectors.split(_SEEN)]
    return torch.cat(parts)


def linear(given: LinearInput, options: AQLMOptions) -> VectorCoded:
    """Code one linear."""
    return aqlm(
        given.weight,
        given.statistics[Gram].value,
        options.grid(given.storage_dtype),
        rounds=options.rounds,
        damping=options.damping,
        seed=options.seed,
    )
