"""How far a Gram matrix of few vectors is chance, and the matrix without as much of it as can be.

From T vectors g (n,) come S = sum_t g_t g_t^T / T, the mean m of its diagonal, and how far S is to be expected from
what it would come to with any number of vectors:

    b^2 = (sum_t |g_t|^4 / T - |S|^2) / (T - 1)        d^2 = |S - m I|^2        rho = min(b^2 / d^2, 1)

Of all mixtures of S and m I, S* = (1 - rho) S + rho m I is to be expected nearest to that. A few vectors that are far
longer than all others make rho large: then S is little else than these.

Worked example. g = [1, 0] and [0, 2]: S = diag(1/2, 2), m = 5/4, |S|^2 = 17/4, b^2 = (17/2 - 17/4) / 1 = 17/4, more
than d^2 = 9/8, so rho = 1: two vectors say nothing about a matrix of two rows. Each of them ten times over:
b^2 = 17/4 / 19, rho = 0.20, S* = diag(0.65, 1.85).

Source: Ledoit, Wolf 2004, "A well-conditioned estimator for large-dimensional covariance matrices", equation 14 and
lemmas 3.2 to 3.5, with a mean that is known to be zero, and T - 1 for an estimate that also holds for few vectors.
"""

from __future__ import annotations

from torch import Tensor


def chance(gram: Tensor, vectors: int, fourth: float) -> float:
    """The share rho, 0 to 1, of `gram` (n, n), the sum over some vectors, that is best replaced by its mean diagonal.

    `fourth` is the sum of the fourth powers of the vectors' lengths.
    """
    if vectors < 2:
        return 1.0
    square = float(gram.double().square().sum()) / vectors**2
    mean = float(gram.diagonal().double().mean()) / vectors
    spread = square - len(gram) * mean**2
    noise = (fourth / vectors - square) / (vectors - 1)
    return min(max(noise, 0.0) / spread, 1.0) if spread > 0 else 1.0


def shrunk(gram: Tensor, vectors: int, fourth: float) -> Tensor:
    """`gram` (n, n) with as much of it replaced; arguments as those of `chance`."""
    rho = chance(gram, vectors, fourth)
    result = gram * (1 - rho)
    result.diagonal().add_(rho * gram.diagonal().mean())
    return result
