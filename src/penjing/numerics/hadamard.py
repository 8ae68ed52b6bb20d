"""Random orthogonal matrices that mix all channels evenly and are cheap to multiply by: Hadamard matrices.

A Hadamard matrix has entries +-1 and orthogonal rows; divided by sqrt(n) it is orthonormal, and every output is a sum
of all inputs with equal weights. Orders that are known here, all products of

    1, 2          [[1, 1], [1, -1]]; its powers are Sylvester's
    q + 1         q prime, q = 3 mod 4 (Paley I):     I + [[0, 1], [-1, Q]]
    2 (q + 1)     q prime, q = 1 mod 4 (Paley II):    C x [[1, 1], [1, -1]] + I x [[1, -1], [-1, -1]]

with C = [[0, 1], [1, Q]], Q[i, j] = 1, -1 or 0 as i - j is a square, no square or zero mod q, and x the Kronecker
product. A size is taken apart into one Paley order and powers of two; where that does not go, a random orthogonal
matrix takes the odd part.

Worked example: 12 = 11 + 1 is Paley I, so 576 = 36 * 16 = 2 (17 + 1) * 2**4 is Paley II times Sylvester, and 4096 is
Sylvester alone. 6 = 2 * 3 has no Hadamard matrix (orders above 2 are multiples of 4): a random 3 by 3 matrix is taken.

Sources: Paley 1933, "On orthogonal matrices"; Ashkboos et al. 2024, QuaRot (arXiv:2404.00456).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

SYLVESTER = 64
"""Largest power of two that is multiplied as one matrix: 64 by 64 products keep the processor busy."""


@dataclass(frozen=True, eq=False)
class Rotation:
    """The orthogonal matrix Q = diag(signs) (F1 x F2 x ...), applied factor by factor; everything in fp64.

    signs    +-1 (n,)
    factors  orthonormal square matrices whose sizes multiply to n
    note     how Q falls short of a Hadamard matrix; empty if it does not
    """

    signs: Tensor
    factors: tuple[Tensor, ...]
    note: str = ""

    @property
    def size(self) -> int:
        """n, the length of the vectors that are rotated."""
        return len(self.signs)

    def apply(self, x: Tensor) -> Tensor:
        """x Q for vectors (..., n) in fp64; the same shape."""
        y = x * self.signs
        after = self.size
        for factor in self.factors:
            after //= len(factor)
            y = y.reshape(-1, len(factor)) @ factor if after == 1 else factor.T @ y.reshape(-1, len(factor), after)
        return y.reshape(x.shape)


def random_hadamard(size: int, seed: int) -> Rotation:
    """A rotation of vectors of `size` with random signs; the same for the same seed.

    Hadamard whenever an order above says so, else with a random orthogonal matrix as one factor and a `note`.
    """
    generator = torch.Generator().manual_seed(seed)
    signs = 1 - 2 * torch.randint(2, (size,), generator=generator).double()
    odd = size // (size & -size)
    order = next((odd * power for power in _powers(size // odd) if paley(odd * power) is not None), None)
    core = paley(order) if order else None
    note = ""
    if core is None:
        order = odd
        core = random_orthogonal(odd, generator)
        note = f"no Hadamard matrix of order {size} is known here, so its factor {odd} is a random orthogonal matrix"
    factors = [core] if len(core) > 1 else []
    rest = size // len(core)
    while rest > 1:
        factors.append(sylvester(min(rest, SYLVESTER)))
        rest //= len(factors[-1])
    return Rotation(signs, tuple(factors), note)


def _powers(limit: int) -> list[int]:
    return [2**exponent for exponent in range(limit.bit_length()) if 2**exponent <= limit]


def sylvester(order: int) -> Tensor:
    """The orthonormal Hadamard matrix of a power of two, fp64 (order, order), symmetric."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < order:
        matrix = torch.kron(_PAIR, matrix)
    return matrix / math.sqrt(order)


def paley(order: int) -> Tensor | None:
    """An orthonormal Hadamard matrix of 1, q + 1 or 2 (q + 1), fp64 (order, order); None for any other order."""
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    if _is_prime(order - 1) and order % 4 == 0:
        matrix = torch.eye(order, dtype=torch.float64) + _bordered(order - 1, -1)
    elif order % 4 == 0 and _is_prime(order // 2 - 1) and order // 2 % 4 == 2:
        conference = _bordered(order // 2 - 1, 1)
        matrix = torch.kron(conference, _PAIR) + torch.kron(torch.eye(order // 2, dtype=torch.float64), _TURNED)
    else:
        return None
    return matrix / math.sqrt(order)


def random_orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Uniformly distributed among the orthogonal matrices, fp64 (size, size); Mezzadri 2007, arXiv:math-ph/0609050."""
    q, r = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64, generator=generator))
    return (q * r.diagonal().sign()).contiguous()


_PAIR = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
_TURNED = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)


def _bordered(prime: int, left: int) -> Tensor:
    """[[0, 1], [left, Q]] with the residue symbols Q of a prime."""
    squares = torch.arange(1, prime) ** 2 % prime
    symbol = torch.full((prime,), -1.0, dtype=torch.float64)
    symbol[squares], symbol[0] = 1.0, 0.0
    place = torch.arange(prime)
    matrix = torch.ones(prime + 1, prime + 1, dtype=torch.float64)
    matrix[0, 0] = 0
    matrix[1:, 0] = left
    matrix[1:, 1:] = symbol[(place.unsqueeze(1) - place) % prime]
    return matrix


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))
