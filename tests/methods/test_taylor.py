"""Scores of single weights by gradients, against fp64 autograd, finite differences, and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from naive import random_weight
from penjing.errors import RecipeError
from penjing.methods.pruning.taylor import TaylorOptions, WeightGradients, keep, scores
from penjing.numerics.masks import keep_largest
from penjing.numerics.ranking import GONE, masks, threshold


def means(parts: list[Tensor]) -> WeightGradients:
    stack = torch.stack(parts)
    return WeightGradients(stack.mean(0), stack.abs().mean(0), stack.square().mean(0))


def test_the_worked_example() -> None:
    weight = torch.tensor([[1.0, -2.0]])
    given = means([torch.tensor([[3.0, 0.5]]), torch.tensor([[-3.0, 0.5]])])
    expected = {"taylor": [0, 1], "taylor-per-text": [3, 1], "fisher": [3, 1], "magnitude": [1, 2]}
    for criterion, values in expected.items():
        found = scores(weight, given, criterion)  # type: ignore[arg-type]
        assert found.tolist() == [values], criterion
        kept = keep(found, TaylorOptions(sparsity=0.5, scope="row"))
        assert kept.tolist() == [[values[0] > values[1], values[1] > values[0]]]


def test_the_first_order_is_the_slope_of_the_loss() -> None:
    """|w g| is how fast the loss changes when w is scaled down, by finite differences in fp64."""
    torch.manual_seed(0)
    weight, inputs, wanted = random_weight(3, 5).double(), torch.randn(20, 5).double(), torch.randn(20, 3).double()

    def loss(value: Tensor) -> Tensor:
        return (torch.tanh(inputs @ value.T) - wanted).square().mean()

    leaf = weight.clone().requires_grad_()
    gradient = torch.autograd.grad(loss(leaf), leaf)[0]
    found = scores(weight.float(), means([gradient.float()]), "taylor")
    for row, column in [(0, 0), (1, 3), (2, 4)]:
        step = torch.zeros_like(weight)
        step[row, column] = 1e-6 * weight[row, column]
        slope = (loss(weight + step) - loss(weight - step)) / 2e-6
        assert float(found[row, column]) == pytest.approx(abs(float(slope)), rel=1e-4)


def test_scopes_and_patterns_count_exactly() -> None:
    found = scores(random_weight(6, 8), None, "magnitude")
    assert int(keep(found, TaylorOptions(sparsity=0.4)).sum()) == 48 - 19
    assert (keep(found, TaylorOptions(sparsity=0.4, scope="row")).sum(1) == 5).all()
    assert (keep(found, TaylorOptions(pattern="1:4")).view(6, 2, 4).sum(2) == 3).all()
    still = torch.ones(6, 8, dtype=torch.bool)
    still[0] = False
    kept = keep(found, TaylorOptions(sparsity=0.4), still)
    assert int(kept.sum()) == 48 - 19 and not kept[0].any()
    with pytest.raises(RecipeError, match="multiple of 3"):
        keep(found, TaylorOptions(pattern="1:3"))


@pytest.mark.parametrize("drop", [0, 1, 17, 60, 149])
def test_one_threshold_is_a_sort_of_everything(drop: int) -> None:
    torch.manual_seed(1)
    parts = [{"a": torch.rand(10, 5), "b": torch.zeros(20)}, {}, {"c": (torch.rand(80) * 4).round() * 1e-20}]
    parts[0]["a"][3] = GONE
    flat = torch.cat([scores.flatten() for part in parts for scores in part.values()])
    expected = keep_largest(flat, drop, flat != GONE)
    found = list(masks(parts, threshold(lambda: parts, drop)))
    assert [list(part) for part in found] == [["a", "b"], [], ["c"]]
    assert torch.equal(torch.cat([mask.flatten() for part in found for mask in part.values()]), expected)
    assert found[0]["a"].shape == (10, 5)


def test_everything_cannot_go() -> None:
    with pytest.raises(ValueError, match="one at least must stay"):
        threshold(lambda: [{"a": torch.rand(4)}], 4)
