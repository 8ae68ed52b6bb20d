"""A whole matrix as one tensor train: V = v_1 ... v_N rows and D = d_1 ... d_N columns, cut together.

    W[i, j] = G_1[i_1, j_1] G_2[i_2, j_2] ... G_N[i_N, j_N]        G_k[i, j] of r_{k-1} x r_k,  r_0 = r_N = 1

with i_1 ... i_N the digits of row i, j_1 ... j_N those of column j, the first the most significant. Numbers in all:

    sum_k r_{k-1} v_k d_k r_k        where D of them were V times

Rows that no tuple of factors matches are made up for by rows of zeros at the end. Cores are found by eigenvalues from
left to right, as SVDs of the matrices (r_{k-1} v_k d_k, rest) would; what is lost is bounded as for vectors (see
`tensor_trains`). A row is r_1 d_1 + ... small products, so no lookup needs the table.

Source: Oseledets 2010, "Approximation of 2^d x 2^d matrices using tensor decomposition"; for embeddings Hrinchuk et al.
2020, "Tensorized Embedding Layers" (arXiv:1901.10787).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

_AT_ONCE = 2**24
"""Numbers of gathered cores that a lookup holds at one time."""


@dataclass(frozen=True)
class TrainMatrix:
    """How a matrix is cut: factors v_1 ... v_N of its rows, d_1 ... d_N of its columns, ranks r_1 ... r_{N-1}."""

    rows: tuple[int, ...]
    columns: tuple[int, ...]
    ranks: tuple[int, ...]

    @classmethod
    def of_rank(cls, rows: tuple[int, ...], columns: tuple[int, ...], rank: int) -> TrainMatrix:
        """With every rank `rank`, or as much as there is to gain where that is less."""
        modes, ranks, left = [v * d for v, d in zip(rows, columns, strict=True)], [], 1
        whole = math.prod(modes)
        for mode in modes[:-1]:
            left *= mode
            ranks.append(min(rank, left, whole // left))
        return cls(rows, columns, tuple(ranks))

    @property
    def shapes(self) -> tuple[tuple[int, int, int, int], ...]:
        """(r_{k-1}, v_k, d_k, r_k) of each core."""
        bounds = pairwise((1, *self.ranks, 1))
        return tuple(
            (before, v, d, after) for v, d, (before, after) in zip(self.rows, self.columns, bounds, strict=True)
        )

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers in each core."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @property
    def label(self) -> str:
        """For people: "tensor-train matrix 36x37x37 by 8x8x9, rank 40"."""
        cut = " by ".join("x".join(map(str, modes)) for modes in (self.rows, self.columns))
        return f"tensor-train matrix {cut}, rank {max(self.ranks, default=1)}"


def covering_modes(count: int, factors: int) -> tuple[int, ...]:
    """`factors` numbers, rising and as equal as can be, whose product is `count` or little more."""
    modes = [math.ceil(count ** (1 / factors) - 1e-9)] * factors
    for place in range(factors):
        others = math.prod(modes) // modes[place]
        modes[place] = max(-(-count // others), 1)
    return tuple(sorted(modes))


def decompose_matrix(matrix: Tensor, how: TrainMatrix) -> Tensor:
    """Cores of a matrix (V, D): fp64 (P,), one after the other, each in row order."""
    count, steps = math.prod(how.rows), len(how.rows)
    table = pad(matrix.double(), (0, 0, 0, count - len(matrix))).reshape(*how.rows, *how.columns)
    rest = table.permute(*(axis for place in range(steps) for axis in (place, steps + place))).reshape(1, -1)
    cores: list[Tensor] = []
    for (before, v, d, after), _ in zip(how.shapes, how.ranks, strict=False):
        core, rest = _split(rest.reshape(before * v * d, -1), after)
        cores.append(core.flatten())
    cores.append(rest.flatten())
    # The size of the matrix is spread over the cores, so that all fit a narrow type.
    norms = [core.norm().clamp(min=torch.finfo(torch.float64).tiny) for core in cores]
    mean = torch.stack(norms).log().mean().exp() if bool(rest.any()) else norms[0]
    return torch.cat([core * (mean / norm) for core, norm in zip(cores, norms, strict=True)])


def _split(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The closest product of (m, rank) and (rank, n), from the eigenvectors of the smaller Gram matrix."""
    if len(matrix) <= matrix.shape[1]:
        basis = torch.linalg.eigh(matrix @ matrix.T)[1][:, -rank:]
        return basis, basis.T @ matrix
    basis = torch.linalg.eigh(matrix.T @ matrix)[1][:, -rank:]
    return matrix @ basis, basis.T


def cores_of(cores: Tensor, how: TrainMatrix) -> list[Tensor]:
    """The cores (P,) one by one, (r_{k-1}, v_k, d_k, r_k)."""
    parts = zip(cores.split(list(how.sizes)), how.shapes, strict=True)
    return [part.reshape(shape) for part, shape in parts]


def rebuild_matrix(cores: Tensor, how: TrainMatrix, height: int) -> Tensor:
    """The matrix (height, D): products in fp64, rounded once to fp32."""
    whole = cores.new_ones(1, 1, 1, dtype=torch.float64)  # rows so far, columns so far, rank
    for core in cores_of(cores.double(), how):
        before, v, d, after = core.shape
        rows, columns = whole.shape[:2]
        grown = (whole.reshape(-1, before) @ core.reshape(before, -1)).reshape(rows, columns, v, d, after)
        whole = grown.transpose(1, 2).reshape(rows * v, columns * d, after)
    return whole[:height, :, 0].float().contiguous()


def rows_of(cores: Sequence[Tensor], tokens: Tensor) -> Tensor:
    """Rows `tokens` (T,) of the matrix, (T, D), in the dtype of `cores` (see `cores_of`): nothing else is computed."""
    widest = max(core[:, 0].numel() for core in cores)
    return torch.cat([_rows_of(cores, part) for part in tokens.split(max(_AT_ONCE // widest, 1))])


def _rows_of(cores: Sequence[Tensor], tokens: Tensor) -> Tensor:
    digits, rest = [], tokens
    for core in reversed(cores):
        digits.append(rest % core.shape[1])
        rest = rest // core.shape[1]
    whole = cores[0].new_ones(len(tokens), 1, 1)
    for core, digit in zip(cores, reversed(digits), strict=True):
        chosen = core[:, digit].transpose(0, 1)  # (T, r, d, r')
        whole = torch.bmm(whole, chosen.flatten(2)).reshape(len(tokens), -1, core.shape[3])
    return whole.squeeze(2)
