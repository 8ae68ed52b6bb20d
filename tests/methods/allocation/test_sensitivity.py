"""Estimates of what rounding costs, against naive sums."""

from __future__ import annotations

import pytest
import torch

from penjing.methods.allocation.sensitivity import expected_kl, extrapolated, output_errors, relative_error

INPUTS = torch.randn(50, 6, generator=torch.Generator().manual_seed(1)).double() * torch.tensor([1, 1, 5, 1, 0, 2.0])
WEIGHT = torch.randn(4, 6, generator=torch.Generator().manual_seed(2)).double()
DIFFERENCE = 0.1 * torch.randn(4, 6, generator=torch.Generator().manual_seed(3)).double()


def naive_errors(matrix: torch.Tensor) -> list[float]:
    return [sum(float(row @ inputs) ** 2 for inputs in INPUTS) for row in matrix]


def test_output_errors() -> None:
    errors = output_errors(DIFFERENCE.float(), (INPUTS.T @ INPUTS).float())
    assert errors.tolist() == pytest.approx(naive_errors(DIFFERENCE), rel=1e-5)
    assert errors.dtype == torch.float64


def test_relative_error() -> None:
    gram = INPUTS.T @ INPUTS
    found = relative_error(WEIGHT, WEIGHT - DIFFERENCE, gram)
    assert found == pytest.approx(sum(naive_errors(DIFFERENCE)) / sum(naive_errors(WEIGHT)), rel=1e-9)


def test_a_linear_that_gives_nothing_loses_nothing() -> None:
    assert relative_error(torch.zeros(4, 6), torch.zeros(4, 6), torch.eye(6)) == 0


def test_the_example_of_the_documentation() -> None:
    errors = output_errors(torch.tensor([[0.1, 0], [0, 0.2]]), torch.tensor([[4.0, 0], [0, 4]]))
    assert errors.tolist() == pytest.approx([0.04, 0.16])
    assert expected_kl(errors, torch.tensor([0.2, 0.8]), 2) == pytest.approx(0.034)


def test_expected_kl_of_a_small_change_of_logits() -> None:
    """Where the linear is the head itself, half the Fisher information is the KL divergence to second order.

    Its outputs do depend on each other there, so changes are independent by outputs and inputs, many of them.
    """
    torch.manual_seed(0)
    inputs, weight = torch.randn(2000, 8).double(), torch.randn(5, 8).double()
    log_p = (inputs @ weight.T).log_softmax(1)
    squares = log_p.exp() * (1 - log_p.exp())  # mean over labels of (onehot - p)^2
    gram = inputs.T @ (inputs * squares.sum(1, keepdim=True))
    measured = expected = 0.0
    for _ in range(40):
        change = 0.01 * torch.randn(5, 8).double()
        log_q = (inputs @ (weight + change).T).log_softmax(1)
        measured += float((log_p.exp() * (log_p - log_q)).sum(1).mean())
        expected += expected_kl(output_errors(change, gram), squares.sum(0) / squares.sum(), 2000)
    assert expected == pytest.approx(measured, rel=0.1)


def test_other_choices_follow_by_the_ratio_of_errors() -> None:
    assert extrapolated(0.3, 1, [4.0, 1.0, 0.25, 0.0]) == pytest.approx([1.2, 0.3, 0.075, 0.0])


def test_nothing_to_extrapolate_from() -> None:
    assert extrapolated(0.3, 1, [0.0, 0.0]) == [0.0, 0.0]
    assert extrapolated(-1e-9, 0, [1.0, 0.5]) == [0.0, 0.0]
