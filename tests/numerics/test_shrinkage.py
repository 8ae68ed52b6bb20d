"""Gram matrices of few vectors against the definition of their shrinkage, and what it is for."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from penjing.numerics.shrinkage import chance, shrunk


def told(vectors: Tensor) -> tuple[Tensor, int, float]:
    return vectors.T @ vectors, len(vectors), float(vectors.square().sum(1).square().sum())


def naive(vectors: Tensor) -> float:
    """The share by its definition, vector by vector."""
    vectors = vectors.double()
    covariance = sum(torch.outer(one, one) for one in vectors) / len(vectors)
    flat = covariance.trace() / len(covariance) * torch.eye(len(covariance), dtype=torch.float64)
    noise = sum((torch.outer(one, one) - covariance).square().sum() for one in vectors) / (
        len(vectors) * (len(vectors) - 1)
    )
    return float(torch.minimum(noise / (covariance - flat).square().sum(), torch.ones(())))


@pytest.mark.parametrize("count", [2, 7, 40, 400])
@pytest.mark.parametrize("tail", [1.0, 3.0])
def test_the_share_is_that_of_the_definition(count: int, tail: float) -> None:
    generator = torch.Generator().manual_seed(count)
    lengths = torch.rand(count, 1, generator=generator) ** tail
    vectors = torch.randn(count, 12, generator=generator) * lengths * torch.linspace(0.1, 2, 12)
    assert chance(*told(vectors)) == pytest.approx(naive(vectors), rel=1e-4)


def test_less_is_chance_the_more_vectors_there_are() -> None:
    vectors = torch.randn(4000, 8, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 2, 8)
    shares = [chance(*told(vectors[:count])) for count in (20, 200, 2000)]
    assert shares[0] > 5 * shares[1] > 25 * shares[2] > 0


def test_what_is_shrunk_is_nearer_to_the_truth() -> None:
    generator = torch.Generator().manual_seed(1)
    truth = torch.diag(torch.linspace(0.2, 2, 30).square())
    off, before = 0.0, 0.0
    for _ in range(20):
        vectors = torch.randn(25, 30, generator=generator) * torch.linspace(0.2, 2, 30)
        gram, count, fourth = told(vectors)
        before += float((gram / count - truth).square().sum())
        off += float((shrunk(gram, count, fourth) / count - truth).square().sum())
    assert off < 0.8 * before


def test_one_vector_far_longer_than_all_others_is_chance() -> None:
    vectors = torch.randn(200, 6, generator=torch.Generator().manual_seed(2)) * 0.01
    vectors[0] = torch.arange(6.0)
    assert chance(*told(vectors)) > 0.95


def test_the_mean_diagonal_stays_and_so_does_what_the_matrix_is_a_multiple_of() -> None:
    vectors = torch.randn(9, 5, generator=torch.Generator().manual_seed(3))
    gram, count, fourth = told(vectors)
    result = shrunk(gram, count, fourth)
    torch.testing.assert_close(result.trace(), gram.trace())
    torch.testing.assert_close(shrunk(4 * gram, count, 16 * fourth), 4 * result)


def test_the_worked_example() -> None:
    two = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    assert chance(*told(two)) == 1
    twenty = two.repeat(10, 1)
    assert chance(*told(twenty)) == pytest.approx(17 / 4 / 19 / (9 / 8))
    torch.testing.assert_close(shrunk(*told(twenty)) / 20, torch.diag(torch.tensor([0.65, 1.85])), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    "vectors", [torch.zeros(0, 4), torch.zeros(3, 4), torch.ones(1, 4), torch.eye(4), torch.eye(4)[:1]]
)
def test_nothing_known_and_nothing_to_shrink_are_finite(vectors: Tensor) -> None:
    result = shrunk(*told(vectors))
    assert result.isfinite().all()
    torch.testing.assert_close(result.trace(), vectors.square().sum())
