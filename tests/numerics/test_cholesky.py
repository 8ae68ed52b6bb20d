"""The factor of the damped inverse, and that it exists for every Gram matrix."""

import warnings

import pytest
import torch

import naive
from penjing.errors import CalibrationError
from penjing.numerics import cholesky
from penjing.numerics.cholesky import DampingWarning, dead_columns, inverse_factor


def test_hand_solved_factor():
    factor, used = inverse_factor(torch.tensor([[2.0, 1.0], [1.0, 1.0]]), 0.0)
    torch.testing.assert_close(factor, torch.tensor([[1.0, -1.0], [0.0, 1.0]]))
    assert used == 0.0


@pytest.mark.parametrize("columns", [1, 7, 64, 150])
def test_factor_is_that_of_the_inverse(columns):
    inputs = naive.correlated(400, max(columns, 2)).double()[:, :columns]
    gram = inputs.T @ inputs
    factor, used = inverse_factor(gram, 0.01)
    assert used == 0.01
    assert torch.equal(factor, factor.triu()) and (factor.diagonal() > 0).all()
    torch.testing.assert_close(factor.T @ factor, torch.linalg.inv(naive.damped(gram, 0.01)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("columns", [9, 16, 37])
def test_inverting_by_halves_changes_nothing(columns, monkeypatch):
    inputs = torch.randn(80, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole, _ = inverse_factor(inputs.T @ inputs, 0.01)
    monkeypatch.setattr(cholesky, "_SMALL", 4)
    halved, _ = inverse_factor(inputs.T @ inputs, 0.01)
    torch.testing.assert_close(halved, whole, rtol=1e-12, atol=1e-14)
    assert (halved.tril(-1) == 0).all()


def test_squared_pivots_are_those_of_the_remaining_columns():
    inputs = naive.correlated(300, 12).double()
    hessian = naive.damped(inputs.T @ inputs, 0.01)
    factor, _ = inverse_factor(inputs.T @ inputs, 0.01)
    for first in range(12):
        expected = torch.linalg.inv(hessian[first:, first:])[0, 0]
        torch.testing.assert_close(factor[first, first] ** 2, expected)


def test_single_precision_is_enough():
    inputs = naive.correlated(600, 300)
    gram = inputs.T @ inputs
    exact, _ = inverse_factor(gram.double(), 0.01)
    single, _ = inverse_factor(gram, 0.01)
    assert (single - exact).norm() / exact.norm() < 1e-4


def test_scale_of_the_gram_matrix_only_scales_the_factor():
    gram = naive.correlated(100, 20).double()
    gram = gram.T @ gram
    small, _ = inverse_factor(gram * 1e-20, 0.01)
    large, _ = inverse_factor(gram * 1e20, 0.01)
    torch.testing.assert_close(small * 1e-10, large * 1e10)


def test_one_token_and_rank_deficiency_need_no_more_than_the_usual_damping():
    for tokens in (1, 5):
        inputs = naive.correlated(tokens, 256)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            factor, used = inverse_factor(inputs.T @ inputs, 0.01)
        assert used == 0.01 and torch.isfinite(factor).all()


def test_damping_rises_until_it_works_and_says_so():
    inputs = naive.correlated(3, 40)
    with pytest.warns(DampingWarning, match="raised from 0 to"):
        factor, used = inverse_factor(inputs.T @ inputs, 0.0)
    assert used > 0 and torch.isfinite(factor).all()


def test_dead_columns_are_decoupled():
    inputs = naive.correlated(50, 8)
    inputs[:, [2, 5]] = 0
    gram = inputs.T @ inputs
    assert dead_columns(gram).nonzero().flatten().tolist() == [2, 5]
    factor, _ = inverse_factor(gram, 0.01)
    for column in (2, 5):
        others = torch.arange(8) != column
        assert (factor[column, others] == 0).all() and (factor[others, column] == 0).all()


def test_no_tokens_at_all_gives_the_identity_with_a_warning():
    gram = torch.zeros(4, 4)
    assert not dead_columns(gram).any()
    with pytest.warns(DampingWarning, match="no calibration token"):
        factor, _ = inverse_factor(gram, 0.01)
    assert torch.equal(factor, torch.eye(4))


def test_indefinite_matrix_falls_back_with_a_warning():
    gram = torch.tensor([[1.0, 1e9], [1e9, 1.0]])
    with pytest.warns(DampingWarning, match="not positive semi-definite"):
        factor, _ = inverse_factor(gram, 0.01)
    assert torch.equal(factor, torch.eye(2))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_not_finite_is_an_error(bad):
    gram = torch.eye(3)
    gram[0, 1] = bad
    with pytest.raises(CalibrationError, match="not finite"):
        inverse_factor(gram, 0.01)
