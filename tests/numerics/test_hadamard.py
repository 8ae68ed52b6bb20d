"""Hadamard matrices: orthogonal, all entries of one magnitude, and applied factor by factor as the whole would be."""

import math

import pytest
import torch

from penjing.numerics.hadamard import paley, random_hadamard, random_orthogonal, sylvester

HIDDEN = [576, 768, 896, 960, 1152, 1536, 1600, 2048, 2304, 2560, 3072, 3328, 3584, 3840, 4096]
"""Widths of residual streams of models in use."""


def matrix(rotation):
    return rotation.apply(torch.eye(rotation.size, dtype=torch.float64))


def is_hadamard(matrix):
    """Orthonormal, and every entry +-1 / sqrt(n)."""
    order = len(matrix)
    assert matrix.dtype == torch.float64
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(order, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(matrix.abs() * math.sqrt(order), torch.ones_like(matrix), rtol=0, atol=1e-13)
    return True


@pytest.mark.parametrize("order", [1, 2, 4, 8, 64, 256])
def test_powers_of_two_are_sylvesters(order):
    """H[i, j] = (-1) ** (ones that i and j share in binary), which is also what scipy.linalg.hadamard gives."""
    expected = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(order)] for i in range(order)]).double()
    torch.testing.assert_close(sylvester(order), expected / math.sqrt(order), rtol=0, atol=1e-15)


@pytest.mark.parametrize("order", [4, 8, 12, 20, 24, 32, 44, 48, 60, 84, 104, 108])
def test_first_construction_of_paley(order):
    assert is_hadamard(paley(order))


@pytest.mark.parametrize("order", [28, 36, 76, 148, 220])
def test_second_construction_of_paley(order):
    assert is_hadamard(paley(order))


@pytest.mark.parametrize("order", [2, 3, 5, 6, 10, 14, 40, 52, 92, 172])
def test_orders_out_of_reach_are_admitted(order):
    """Either no prime fits, or the order is no multiple of four."""
    assert paley(order) is None


def test_the_smallest_of_paley_by_hand():
    """q = 3: squares are {1}, so Q has -1 right of the diagonal and 1 left of it, cyclically."""
    rows = [[1, 1, 1, 1], [-1, 1, -1, 1], [-1, 1, 1, -1], [-1, -1, 1, 1]]
    torch.testing.assert_close(paley(4), torch.tensor(rows, dtype=torch.float64) / 2)


@pytest.mark.parametrize("size", HIDDEN)
def test_widths_of_real_models_have_hadamard_matrices(size):
    rotation = random_hadamard(size, seed=0)
    assert not rotation.note
    assert math.prod(map(len, rotation.factors)) == size
    for factor in rotation.factors:
        assert is_hadamard(factor)
    assert rotation.signs.abs().eq(1).all() and 0.3 < float(rotation.signs.gt(0).double().mean()) < 0.7


@pytest.mark.parametrize("size", [1, 2, 4, 12, 48, 80, 96, 128, 192, 576])
def test_the_whole_matrix(size):
    assert is_hadamard(matrix(random_hadamard(size, seed=3)))


@pytest.mark.parametrize("size", [3, 6, 7, 18])
def test_where_no_hadamard_matrix_exists_the_odd_part_is_random(size):
    rotation = random_hadamard(size, seed=0)
    assert f"factor {size // (size & -size)} is a random orthogonal matrix" in rotation.note
    whole = matrix(rotation)
    torch.testing.assert_close(whole @ whole.T, torch.eye(size, dtype=torch.float64), rtol=0, atol=1e-13)


@pytest.mark.parametrize(("size", "shape"), [(576, (5,)), (24, (2, 3)), (128, ()), (6, (0,)), (16, (1, 1))])
def test_factors_one_by_one_are_the_kronecker_product(size, shape):
    rotation = random_hadamard(size, seed=1)
    product = torch.ones(1, 1, dtype=torch.float64)
    for factor in rotation.factors:
        product = torch.kron(product, factor)
    x = torch.randn(*shape, size, dtype=torch.float64)
    before = x.clone()
    torch.testing.assert_close(rotation.apply(x), (x * rotation.signs) @ product)
    assert torch.equal(x, before)


def test_views_of_any_stride():
    rotation = random_hadamard(12, seed=0)
    x = torch.randn(12, 5, dtype=torch.float64)
    torch.testing.assert_close(rotation.apply(x.T), rotation.apply(x.T.contiguous()))


def test_the_seed_decides():
    for size in (64, 6):
        assert torch.equal(matrix(random_hadamard(size, 4)), matrix(random_hadamard(size, 4)))
        assert not torch.equal(matrix(random_hadamard(size, 4)), matrix(random_hadamard(size, 5)))


def test_one_large_entry_is_spread_evenly():
    x = torch.zeros(576, dtype=torch.float64)
    x[123] = 100.0
    torch.testing.assert_close(random_hadamard(576, 0).apply(x).abs(), torch.full_like(x, 100 / 24))


def test_random_orthogonal_matrices_prefer_no_direction():
    """Without the correction of signs, the diagonal of the QR's Q would lean to one side."""
    generator = torch.Generator().manual_seed(0)
    diagonals = torch.stack([random_orthogonal(3, generator).diagonal() for _ in range(400)])
    assert float(diagonals.mean().abs()) < 0.06
