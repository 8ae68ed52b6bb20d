"""Coordinate descent against a plain loop in fp64, scales against least squares, and both inside GPTQ."""

from __future__ import annotations

import pytest
import torch

import naive
from penjing.methods.quantization.gptq import GPTQOptions, gptq
from penjing.numerics.descent import best_scales, descend
from penjing.numerics.grids import IntegerGrid
from penjing.numerics.sweep import block_bounds
from penjing.representations import Masked

ROWS, COLUMNS = 6, 20


def problem(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = naive.correlated(200, COLUMNS, seed=seed, mix=0.4)
    return naive.random_weight(ROWS, COLUMNS, seed=seed + 1), naive.damped(inputs.T @ inputs, 0.01).float()


def loss(weight: torch.Tensor, values: torch.Tensor, hessian: torch.Tensor) -> float:
    difference = (weight - values).double()
    return float(((difference @ hessian.double()) * difference).sum())


@pytest.mark.parametrize("block_size", [1, 7, 20])
def test_a_round_takes_the_best_grid_point_of_every_weight_in_turn(block_size: int) -> None:
    weight, hessian = problem()
    step = 0.02
    start = (weight / step).round() * step
    columns = start.T.contiguous()
    bounds = block_bounds(COLUMNS, block_size)
    descend(columns, weight.T.contiguous(), hessian, bounds, lambda position, column: (column / step).round() * step)
    expected, reference, metric = start.double(), weight.double(), hessian.double()
    for column in range(COLUMNS):
        best = expected[:, column] + ((reference - expected) @ metric)[:, column] / metric[column, column]
        expected[:, column] = (best / step).round() * step
    torch.testing.assert_close(columns.T.double(), expected, rtol=1e-5, atol=1e-6)
    assert loss(weight, columns.T, hessian) < loss(weight, start, hessian)


def test_no_single_weight_can_be_better_after_enough_rounds() -> None:
    weight, hessian = problem(3)
    step = 0.02
    columns = ((weight / step).round() * step).T.contiguous()
    for _ in range(50):
        descend(columns, weight.T.contiguous(), hessian, [0, COLUMNS], lambda _, column: (column / step).round() * step)
    least = loss(weight, columns.T, hessian)
    for row in range(ROWS):
        for column in range(COLUMNS):
            for move in (-step, step):
                moved = columns.T.clone()
                moved[row, column] += move
                assert loss(weight, moved, hessian) >= least - 1e-6


@pytest.mark.parametrize("width", [5, 6, 20])
def test_scales_are_those_of_least_squares(width: int) -> None:
    weight, hessian = problem()
    codes = torch.randint(-4, 4, weight.shape, generator=torch.Generator().manual_seed(2)).float()
    groups = -(-COLUMNS // width)
    found = best_scales(codes, weight, hessian, torch.ones(ROWS, groups), width)
    root = torch.linalg.cholesky(hessian.double()).T
    for row in range(ROWS):
        basis = torch.zeros(COLUMNS, groups, dtype=torch.float64)
        for column in range(COLUMNS):
            basis[column, column // width] = codes[row, column]
        solution = torch.linalg.lstsq(root @ basis, (root @ weight[row].double())[:, None]).solution[:, 0]
        torch.testing.assert_close(found[row].double(), solution, rtol=1e-3, atol=1e-5)


def test_a_group_of_zeros_keeps_its_scale() -> None:
    weight, hessian = problem()
    codes = torch.ones_like(weight)
    codes[:, 5:10] = 0
    scale = torch.full((ROWS, 4), 0.25)
    found = best_scales(codes, weight, hessian, scale, 5)
    assert (found[:, 1] == 0.25).all() and (found[:, [0, 2, 3]] != 0.25).all()


def test_worked_example() -> None:
    weight, hessian = torch.tensor([[0.6, 0.8]]), torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    columns = torch.tensor([[1.0], [0.0]])
    descend(columns, weight.T.contiguous(), hessian, [0, 2], lambda _, column: column.round())
    assert columns.flatten().tolist() == [1, 0]
    found = best_scales(torch.tensor([[1.0, 0.0]]), weight, hessian, torch.ones(1, 1), 2)
    assert found.item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("order", ["natural", "activation", "group-activation"])
@pytest.mark.parametrize("keys", [{}, {"symmetric": False}, {"group_size": None}, {"bits": 2}])
def test_gptq_loses_less_with_every_round(order: str, keys: dict) -> None:
    inputs = naive.correlated(400, 48, mix=0.4)
    weight, gram = naive.random_weight(16, 48), inputs.T @ inputs
    made = {"bits": 3, "group_size": 16, "symmetric": True, "scale_rule": "full", "scale_dtype": torch.float32, **keys}
    grid = IntegerGrid(**made)
    losses = [loss(weight, gptq(weight, gram, grid, order=order, descent=rounds).dense(), gram) for rounds in (0, 1, 3)]
    assert losses[1] < 0.97 * losses[0] and losses[2] <= 1.001 * losses[1]


def test_pruned_weights_and_dead_inputs_stay_zero() -> None:
    inputs = naive.correlated(400, 48)
    inputs[:, 3] = 0
    weight, gram = naive.random_weight(16, 48), inputs.T @ inputs
    kept = weight.abs() > weight.abs().median()
    plain = gptq(weight, gram, IntegerGrid(3, 16), kept=kept)
    result = gptq(weight, gram, IntegerGrid(3, 16), kept=kept, descent=2)
    assert isinstance(result, Masked)
    assert (result.dense()[~kept] == 0).all() and (result.dense()[:, 3] == 0).all()
    assert loss(weight, result.dense(), gram) < loss(weight, plain.dense(), gram)


@pytest.mark.parametrize("weights", [torch.zeros(4, 32), torch.full((4, 32), 0.25)])
def test_ugly_weights_give_finite_results(weights: torch.Tensor) -> None:
    for inputs in (torch.ones(1, 32), torch.zeros(3, 32), naive.correlated(5, 32)):
        with pytest.warns(Warning) if not inputs.any() else torch.no_grad():
            result = gptq(weights, inputs.T @ inputs, IntegerGrid(4, 16), descent=2)
        assert torch.isfinite(result.dense()).all()


def test_late_groups_are_refused() -> None:
    with pytest.raises(ValueError, match="static_groups"):
        GPTQOptions(descent=1, static_groups=False)
