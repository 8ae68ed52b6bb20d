"""What rounding lost, as a change of low rank: the best one, and better still when codes are chosen with it."""

from __future__ import annotations

import pytest
import torch

from penjing.methods.adaptation.lora import Adapter, merge
from penjing.methods.adaptation.residual import loftq, residual_change
from penjing.representations import Dense, Masked


def round_to(step: float):
    return lambda weight: (weight / step).round() * step


def test_the_worked_example_and_ranks_beyond_the_matrix():
    up, down = residual_change(torch.tensor([[3.0, 0.0], [0.0, 1.0]]), 1)
    torch.testing.assert_close(up @ down, torch.tensor([[3.0, 0.0], [0.0, 0.0]]))
    up, down = residual_change(torch.randn(3, 5), 8)
    assert up.shape == (3, 8) and down.shape == (8, 5)
    with pytest.raises(ValueError, match="not finite"):
        residual_change(torch.tensor([[torch.nan]]), 1)


def test_loftq_is_no_worse_than_absorbing_and_full_rank_is_exact():
    weight, quantise = torch.randn(24, 40), round_to(0.7)

    def error(up: torch.Tensor, down: torch.Tensor) -> float:
        return float(torch.linalg.norm(weight - quantise(weight - up @ down) - up @ down))

    absorbed = residual_change(weight - quantise(weight), 4)
    plain = float(torch.linalg.norm(weight - quantise(weight)))
    assert error(*loftq(weight, quantise, 4)) <= error(*absorbed) < plain
    up, down = residual_change(weight - quantise(weight), 24)
    torch.testing.assert_close(quantise(weight) + up @ down, weight, rtol=1e-4, atol=1e-5)


def test_the_worked_example_of_merging():
    adapter = Adapter(torch.tensor([[3.0, 5.0]]), torch.tensor([[2.0]]), 1.0)
    weight = torch.tensor([[1.0, 0.0]])
    assert merge("w", Dense(weight), adapter).dense().tolist() == [[7.0, 10.0]]
    pruned = Masked(Dense(weight), torch.tensor([[True, False]]))
    assert merge("w", pruned, adapter).dense().tolist() == [[7.0, 0.0]]
