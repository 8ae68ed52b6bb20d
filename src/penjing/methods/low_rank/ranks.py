"""Which matrix gets how much rank: from spectra, exactly.

With U_r the top eigenvectors of W G W^T (see `svd_llm`), rank r leaves the sum of all further eigenvalues as squared
error of the output. Over their sum, these are the shares that a rank loses; all shares of all matrices follow from
one decomposition each, and nothing has to be tried out. A share says how damaged an output is, not whether anyone
cares. That the gradients of the model's predictions know: with the squares of those that reach an output (r_i, a share
per output) and a token (a, their sum), rank r is expected to cost

    1/(2 tokens) sum_i r_i (D H_a D^T)_ii = 1/(2 tokens) sum_(k, l > r) A_kl B_kl        nats per token

with D = (1 - U_r U_r^T) W, H_a = sum a x x^T, A = U^T diag(r) U and B = U^T W H_a W^T U (see
`methods.allocation.sensitivity`): again one decomposition for all ranks. Two ways to choose:

    energy   for every matrix the smallest rank that keeps a share of the squared output
    budget   the ranks with the least summed loss whose parameters fit: the multiple-choice knapsack with the options
             rank m, 2m, ... r(N + K) parameters each, and dense, N K parameters without loss

Without the dense option and with m = 1 the latter is what a greedy choice gives, one unit of rank after the other by
what it saves per parameter, since eigenvalues fall; with it, a matrix may be better off whole, which greed does not
see.

Worked example: a 4 x 4 and an 8 x 8 matrix with spectra (.9, .1, 0, 0) and (.4, .3, .2, .1, 0 ...); a unit of rank
takes 8 and 16 parameters. For 40 parameters, rank 1 and 2 leave .1 + .3; dense and 1 take 32 and leave 0 + .6: (1,
2).

Source: Eckart, Young 1936, and the knapsack and the Fisher information of `methods.allocation`; one ratio for all is
what arXiv:2403.07378 uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penjing.methods.allocation.knapsack import knapsack
from penjing.methods.low_rank.svd_llm import output_basis


@dataclass(frozen=True)
class Spectrum:
    """What a matrix, or several of one shape that must share a rank, loses by rank.

    shape   (N, K)
    count   how many matrices
    losses  fp64 (min(N, K) + 1,): what rank 0, 1, ... loses, summed over the matrices
    """

    shape: tuple[int, int]
    count: int
    losses: Tensor

    def parameters(self, rank: int | None) -> int:
        """Of the factors, or of the matrices themselves for None."""
        rows, columns = self.shape
        return self.count * (rows * columns if rank is None else rank * (rows + columns))

    def options(self, multiple: int) -> list[int | None]:
        """Ranks that are worth it, and None for dense."""
        rows, columns = self.shape
        return [*range(multiple, -(-rows * columns // (rows + columns)), multiple), None]

    def loss(self, rank: int | None) -> float:
        """The share left out, or the nats per token expected."""
        return 0.0 if rank is None else float(self.losses[min(rank, len(self.losses) - 1)])


def spectrum(weight: Tensor, gram: Tensor) -> Tensor:
    """Shares of the squared output that ranks 0, 1, ... of `weight` (N, K) leave out, given `gram` (K, K): fp64."""
    weight, gram = weight.double(), gram.double()
    if weight.shape[0] > weight.shape[1]:
        values, vectors = torch.linalg.eigh(gram)
        weight = (weight @ (vectors * values.clamp(min=0).sqrt())).T
        gram = torch.eye(weight.shape[1], dtype=torch.float64)
    values = torch.linalg.eigvalsh(weight @ gram @ weight.T).clamp(min=0).flip(0)
    left = torch.nn.functional.pad(values.flip(0).cumsum(0).flip(0), (0, 1))
    return left / left[0] if left[0] > 0 else left


def expected_losses(weight: Tensor, gram: Tensor, weighted: Tensor, shares: Tensor, tokens: int) -> Tensor:
    """Nats per token that ranks 0, 1, ... of `weight` (N, K) are expected to cost: fp64 (min(N, K) + 1,).

    gram      (K, K), which says what each rank keeps
    weighted  (K, K): the same sum over `tokens` tokens that count as much as their squared gradients
    shares    (N,): of each output in the squared gradients
    """
    basis = output_basis(weight, gram, min(weight.shape))
    right = basis.T @ weight.double()
    cared = basis.T @ (shares.double().unsqueeze(1) * basis)
    pairs = cared * (right @ weighted.double() @ right.T)
    left = pairs.flip(0, 1).cumsum(0).cumsum(1).diagonal().flip(0)
    return torch.nn.functional.pad(left.clamp(min=0), (0, 1)) / (2 * tokens)


def by_energy(spectra: Sequence[Spectrum], kept: float, multiple: int) -> list[int | None]:
    """For each the smallest rank, a multiple of `multiple`, that keeps the share `kept`; None (dense) without one."""
    return [
        next((rank for rank in one.options(multiple) if one.loss(rank) <= (1 - kept) * one.count), None)
        for one in spectra
    ]


def by_budget(spectra: Sequence[Spectrum], parameters: int, multiple: int) -> list[int | None]:
    """The ranks (None: dense) with the least summed loss whose parameters fit.

    Raises PlanError, naming the smallest number that would do, when not even the smallest ranks fit.
    """
    options = [one.options(multiple) for one in spectra]
    sizes = [[one.parameters(rank) for rank in ranks] for one, ranks in zip(spectra, options, strict=True)]
    losses = [[one.loss(rank) for rank in ranks] for one, ranks in zip(spectra, options, strict=True)]
    chosen = knapsack(sizes, losses, parameters)
    return [ranks[place] for ranks, place in zip(options, chosen, strict=True)]
