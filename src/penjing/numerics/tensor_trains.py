"""Tensor trains of vectors: a vector of D = I_1 I_2 ... I_N numbers as a chain of N small cores.

    x[i_1 ... i_N] = G_1[i_1] G_2[i_2] ... G_N[i_N]        G_k[i] of r_{k-1} x r_k,  r_0 = r_N = 1

    numbers per vector:  sum_k r_{k-1} I_k r_k

Cores are found by SVDs from left to right (TT-SVD): the vector as an I_1 x rest matrix gives G_1 and what is left,
S V^T, which is split again. With every rank as large as the matrices allow it is exact; else the squared error is at
most the sum of all squared singular values left out, and at most N - 1 times the least there is.

Source: Oseledets 2011, "Tensor-Train Decomposition".
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import torch
from torch import Tensor

_AT_ONCE = 4096
"""Vectors that are decomposed or rebuilt together."""


@dataclass(frozen=True)
class Train:
    """How vectors are cut: `modes` I_1 ... I_N and the inner ranks r_1 ... r_{N-1}."""

    modes: tuple[int, ...]
    ranks: tuple[int, ...]

    @classmethod
    def of_rank(cls, modes: tuple[int, ...], rank: int) -> Train:
        """With every rank `rank`, or as much as there is to gain where that is less."""
        whole, ranks, left = math.prod(modes), [], 1
        for mode in modes[:-1]:
            left *= mode
            ranks.append(min(rank, left, whole // left))
        return cls(modes, tuple(ranks))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers in each core."""
        bounds = (1, *self.ranks, 1)
        return tuple(before * mode * after for mode, (before, after) in zip(self.modes, pairwise(bounds), strict=True))

    @property
    def label(self) -> str:
        """For people: "tensor train 8x8x9, rank 2"."""
        return f"tensor train {'x'.join(map(str, self.modes))}, rank {max(self.ranks, default=1)}"


@cache
def near_modes(width: int, count: int) -> tuple[int, ...]:
    """The `count` factors of `width`, rising and at least 2, with the least sum; ValueError when it has too few."""
    if count == 1:
        return (width,)
    found = []
    for first in range(2, round(width ** (1 / count)) + 1):
        if width % first == 0:
            with suppress(ValueError):
                found.append((first, *near_modes(width // first, count - 1)))
    if not found:
        raise ValueError(f"{width} has too few prime factors for {count} modes")
    return min((tuple(sorted(modes)) for modes in found), key=sum)


def decompose(vectors: Tensor, train: Train) -> Tensor:
    """Cores of every row of `vectors` (V, D): fp64 (V, P), one core after the other, each in row order."""
    return torch.cat([_decompose(part.double(), train) for part in vectors.split(_AT_ONCE)])


def _decompose(vectors: Tensor, train: Train) -> Tensor:
    rest, before = vectors, 1
    cores: list[Tensor] = []
    for mode, rank in zip(train.modes, train.ranks, strict=False):
        matrix = rest.reshape(len(vectors), before * mode, -1)
        u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
        # The sizes of the vectors are spread over the cores, so that all fit a narrow type.
        size = s[:, :1].clamp(min=torch.finfo(s.dtype).tiny).pow(1 / (len(train.modes) - len(cores)))
        cores.append((u[:, :, :rank] * size.unsqueeze(2)).flatten(1))
        rest = s[:, :rank].unsqueeze(2) * vt[:, :rank] / size.unsqueeze(2)
        before = rank
    cores.append(rest.flatten(1))
    return torch.cat(cores, 1)


def rebuild(cores: Tensor, train: Train) -> Tensor:
    """The vectors (V, D) that `cores` (V, P) stand for, in the dtype of the cores."""
    whole = cores.new_ones(len(cores), 1, 1)
    parts = zip(cores.split(list(train.sizes), 1), (1, *train.ranks), (*train.ranks, 1), strict=True)
    for core, before, after in parts:
        whole = torch.bmm(whole, core.reshape(len(cores), before, -1)).reshape(len(cores), -1, after)
    return whole.flatten(1)


def rebuild_exactly(cores: Tensor, train: Train) -> Tensor:
    """The same in fp32, summed in fp64, some vectors at a time: the same bits however many there are."""
    return torch.cat([rebuild(part.double(), train).float() for part in cores.split(_AT_ONCE)])
