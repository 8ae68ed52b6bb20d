"""Searched scales: never worse than the rule's by their own measure, near the best there is, safe on ugly groups."""

import pytest
import torch

import naive
from penjing.compiled import helper
from penjing.methods.quantization.gptq import gptq
from penjing.numerics import scale_search
from penjing.numerics.cholesky import inverse_factor
from penjing.numerics.grids import IntegerGrid
from penjing.numerics.scale_search import ROWS_AT_ONCE, fit_group, fit_rows, metric_of_sweep

COLUMNS = 48


def grids(dtype=torch.bfloat16):
    rules = [(True, rule, "integer") for rule in ("full", "narrow", "signed-max")]
    kinds = [*rules, (False, "full", "integer"), (False, "full", "float")]
    return [IntegerGrid(bits, 16, *kind[:2], dtype, kind[2]) for bits in (2, 3, 4, 8) for kind in kinds]


def gram_of_inputs(columns=COLUMNS, seed=0):
    inputs = naive.correlated(128, columns, seed=seed)
    return inputs.T @ inputs


def metric_of(gram, search):
    return gram.diagonal() if search == "diagonal" else gram


def losses(weight, grid, metric, scale, zero):
    """d M d^T of every row and group in fp64, (N, G), number by number over groups."""
    columns = weight.shape[1]
    decoded = grid.decode(
        grid.encode(weight, grid.spread(scale, columns), grid.spread(zero, columns)),
        grid.spread(scale, columns),
        grid.spread(zero, columns),
    )
    change = (weight - decoded).double()
    full = torch.diag(metric).double() if metric.dim() == 1 else metric.double()
    found = []
    for group in naive.groups_of(columns, grid):
        members = slice(group.start, group.stop)
        found.append(((change[:, members] @ full[members, members]) * change[:, members]).sum(1))
    return torch.stack(found, 1)


@pytest.mark.parametrize("grid", grids(), ids=lambda grid: f"{grid.bits} {grid.label}")
@pytest.mark.parametrize("search", ["diagonal", "gram"])
def test_never_worse_than_the_rule_and_better_on_the_whole(grid, search):
    weight, metric = naive.random_weight(24, COLUMNS), metric_of(gram_of_inputs(), search)
    ruled = losses(weight, grid, metric, *grid.fit_rows(weight))
    scale, zero = fit_rows(weight, grid, metric)
    found = losses(weight, grid, metric, scale, zero)
    assert (found <= ruled * (1 + 1e-4) + 1e-12).all()
    assert found.sum() < (0.99 if grid.bits < 8 else 1.0) * ruled.sum()
    assert torch.equal(scale, scale.to(grid.scale_dtype).float()) and (scale != 0).all()
    assert torch.equal(zero, zero.to(grid.zero_dtype).float()) and (grid.symmetric <= (zero == 0)).all()


def test_worked_example():
    weight, grid = torch.tensor([[1.0, 0.9, -0.1]]), IntegerGrid(2, None, True, "full", torch.float32)
    scale, zero = fit_group(weight, grid, torch.ones(3))
    assert scale.item() == pytest.approx(0.95) and zero.item() == 0
    assert losses(weight, grid, torch.ones(3), scale.unsqueeze(1), zero.unsqueeze(1)).item() == pytest.approx(0.015)
    ruled, zero = grid.fit_rows(weight)
    assert losses(weight, grid, torch.ones(3), ruled, zero).item() == pytest.approx(0.175, abs=0.01)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_close_to_trying_every_scale(bits):
    grid = IntegerGrid(bits, None, True, "full", torch.float32)
    weight, metric = naive.random_weight(8, 16), torch.rand(16, generator=torch.Generator().manual_seed(0))
    found = losses(weight, grid, metric, *fit_rows(weight, grid, metric)).squeeze(1)
    widest = weight.abs().amax(1)[:, None] / 2 ** (bits - 2)
    tried = torch.linspace(-1.2, 1.2, 2000)[:, None, None] * widest
    codes = (weight / tried).round().clamp(grid.low, grid.high)
    best = ((codes * tried - weight).double().square() * metric).sum(2).amin(0)
    assert (found <= best * 1.1).all() and found.sum() <= best.sum() * 1.03


def test_what_costs_nothing_does_not_count():
    """One huge weight at an input that is never active must not stretch the grid."""
    weight, metric = naive.random_weight(4, 16), torch.ones(16)
    weight[:, 5], metric[5] = 3, 0
    grid = IntegerGrid(4, None, True, "full", torch.float32)
    scale, zero = fit_rows(weight, grid, metric)
    assert (
        losses(weight, grid, metric, scale, zero).sum()
        < 0.1 * losses(weight, grid, metric, *grid.fit_rows(weight)).sum()
    )
    assert scale.abs().max() < 0.1


def test_without_costs_the_rule_decides():
    weight = naive.random_weight(4, COLUMNS)
    for grid in grids()[:5]:
        for metric in (None, torch.zeros(COLUMNS), torch.zeros(COLUMNS, COLUMNS)):
            assert all(map(torch.equal, fit_rows(weight, grid, metric), grid.fit_rows(weight)))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("search", ["diagonal", "gram"])
def test_one_scale_per_matrix_or_row_and_short_last_groups(symmetric, search):
    weight, metric = naive.random_weight(6, COLUMNS), metric_of(gram_of_inputs(), search)
    for size, groups in (("tensor", 1), (None, 1), (20, 3)):
        grid = IntegerGrid(3, size, symmetric)
        scale, zero = fit_rows(weight, grid, metric)
        assert scale.shape == zero.shape == (6, groups)
        assert size != "tensor" or (len(scale.unique()) == 1 and len(zero.unique()) == 1)
        ruled = losses(weight, grid, metric, *grid.fit_rows(weight)).sum()
        assert losses(weight, grid, metric, scale, zero).sum() < ruled


@pytest.mark.parametrize("grid", grids(), ids=lambda grid: f"{grid.bits} {grid.label}")
def test_the_kernel_finds_what_trying_one_by_one_finds(grid, monkeypatch):
    if helper("scale_search.cpp", "penjing.numerics") is None:
        pytest.skip("no C++ compiler")
    weight, costs = naive.random_weight(40, COLUMNS), gram_of_inputs().diagonal()
    fast = fit_rows(weight, grid, costs)
    monkeypatch.setattr(scale_search, "helper", lambda *_: None)
    slow = fit_rows(weight, grid, costs)
    torch.testing.assert_close(
        losses(weight, grid, costs, *fast), losses(weight, grid, costs, *slow), rtol=1e-4, atol=0
    )


def test_rows_do_not_affect_each_other():
    weight, metric = naive.random_weight(ROWS_AT_ONCE + 3, 16), gram_of_inputs(16)
    grid = IntegerGrid(3, None, False)
    together = fit_rows(weight, grid, metric)
    alone = fit_rows(weight[-2:], grid, metric)
    assert all(torch.equal(whole[-2:], part) for whole, part in zip(together, alone, strict=True))


@pytest.mark.parametrize("value", [0.0, 0.7, -0.7, 1e-42, 3e37])
@pytest.mark.parametrize("grid", grids()[5:10], ids=lambda grid: grid.label)
def test_constant_groups_decode_to_finite_values_and_zeros_stay(grid, value):
    weight = torch.full((2, COLUMNS), value)
    weight[:, ::4] = 0
    for metric in (torch.ones(COLUMNS), gram_of_inputs()):
        scale, zero = fit_rows(weight, grid, metric)
        scale, zero = grid.spread(scale, COLUMNS), grid.spread(zero, COLUMNS)
        decoded = grid.decode(grid.encode(weight, scale, zero), scale, zero)
        assert torch.isfinite(decoded).all()
        assert grid.zero == "float" or (decoded[:, ::4] == 0).all()


def test_in_a_sweep_an_error_costs_what_remains_after_the_columns_behind_made_up_for_it():
    gram = gram_of_inputs().double() + torch.eye(COLUMNS)
    visited = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(0))
    factor, _ = inverse_factor(gram[visited][:, visited], 0)
    metric = metric_of_sweep(gram, factor, visited, "diagonal")
    for place in (0, 5, COLUMNS - 1):
        column, later = visited[place], visited[place + 1 :]
        helped = gram[column, later] @ torch.linalg.solve(gram[later][:, later], gram[later, column])
        assert metric[column].item() == pytest.approx(float(gram[column, column] - helped), rel=1e-4)
    assert metric_of_sweep(gram, factor, visited, "gram") is gram
    assert metric_of_sweep(gram, factor, visited, "none") is None


@pytest.mark.parametrize("order", ["activation", "group-activation"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_gptq_gains_by_it(order, symmetric):
    found = {"none": 0.0, "diagonal": 0.0, "gram": 0.0}
    grid = IntegerGrid(3, 16, symmetric)
    for seed in range(4):
        weight, gram = naive.random_weight(24, COLUMNS, seed=seed), gram_of_inputs(seed=seed)
        for search in found:
            result = gptq(weight, gram, grid, order=order, static_groups=order == "activation", scale_search=search)
            found[search] += naive.loss(weight, result.dense(), gram)
    assert found["diagonal"] < 0.95 * found["none"] and found["gram"] < found["none"]
