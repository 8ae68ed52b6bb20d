"""Ranks from spectra: brute force, energy, spectra of outputs."""

import itertools

import pytest
import torch

import naive
from penjing.errors import PlanError
from penjing.methods.low_rank.ranks import Spectrum, by_budget, by_energy, expected_losses, spectrum
from penjing.methods.low_rank.svd_llm import svd_llm


def falling(shape, seed, count=1):
    values = torch.rand(min(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    values = count * values.sort(descending=True).values / values.sum()
    return Spectrum(shape, count, torch.cat([values.flip(0).cumsum(0).flip(0), torch.zeros(1, dtype=torch.float64)]))


@pytest.mark.parametrize("shape", [(14, 10), (8, 12)])
@pytest.mark.parametrize("tokens", [200, 4])
def test_spectra_are_the_losses_of_svd_llm(shape, tokens):
    inputs = naive.correlated(tokens, shape[1])
    weight, gram = naive.random_weight(*shape), inputs.T @ inputs
    losses, total = spectrum(weight, gram), naive.loss(weight, torch.zeros(shape), gram)
    assert len(losses) == min(shape) + 1 and losses[0] == 1 and losses[-1] == 0
    for rank in (1, 3, 6):
        lost = naive.loss(weight, svd_llm(weight, gram, rank, torch.float32).dense(), gram)
        assert float(losses[rank]) == pytest.approx(lost / total, rel=1e-3, abs=1e-7)
    assert (spectrum(torch.zeros(shape), gram) == 0).all()


@pytest.mark.parametrize("shape", [(14, 10), (8, 12)])
def test_expected_losses_are_those_of_what_svd_llm_makes(shape):
    inputs, counted = naive.correlated(200, shape[1]).double(), torch.rand(200, 1, dtype=torch.float64) ** 4
    weight, gram, weighted = naive.random_weight(*shape), inputs.T @ inputs, (inputs * counted).T @ inputs
    shares = torch.rand(shape[0], dtype=torch.float64)
    losses = expected_losses(weight, gram, weighted, shares / shares.sum(), 200)
    assert len(losses) == min(shape) + 1 and losses[-1] == 0
    for rank in range(1, min(shape)):
        lost = weight.double() - svd_llm(weight, gram, rank, torch.float32).dense().double()
        naively = float((counted * (inputs @ lost.T) ** 2 * shares / shares.sum()).sum()) / 400
        assert float(losses[rank]) == pytest.approx(naively, rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("seed", range(6))
def test_no_other_ranks_lose_less(seed):
    spectra = [falling((8, 6), seed), falling((6, 10), seed + 50, 2), falling((9, 9), seed + 90)]
    whole = sum(one.parameters(None) for one in spectra)
    for budget in (whole // 3, whole // 2, whole - 1, whole):
        chosen = by_budget(spectra, budget, 1)
        found = sum(one.loss(rank) for one, rank in zip(spectra, chosen, strict=True))
        assert sum(one.parameters(rank) for one, rank in zip(spectra, chosen, strict=True)) <= budget
        least = min(
            sum(one.loss(rank) for one, rank in zip(spectra, ranks, strict=True))
            for ranks in itertools.product(*(one.options(1) for one in spectra))
            if sum(one.parameters(rank) for one, rank in zip(spectra, ranks, strict=True)) <= budget
        )
        assert found == pytest.approx(least, abs=1e-12)
    assert by_budget(spectra, whole, 1) == [None] * 3
    with pytest.raises(PlanError, match="too small"):
        by_budget(spectra, 5, 1)


def test_the_smallest_rank_that_keeps_the_energy():
    spectra = [falling((40, 40), 1), falling((20, 60), 2, 3)]
    for kept in (0.3, 0.8, 0.99):
        for one, rank in zip(spectra, by_energy(spectra, kept, 2), strict=True):
            smaller = one.options(2)[: one.options(2).index(rank)]
            assert one.loss(rank) <= (1 - kept) * one.count
            assert all(one.loss(other) > (1 - kept) * one.count for other in smaller)
    assert by_energy(spectra, 1.0, 2) == [None, None]
    assert max(rank for rank in spectra[0].options(8) if rank) == 16  # 20 would be as large as the matrix
