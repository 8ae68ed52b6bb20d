"""Weights after pruning: the exact least-squares solution on a mask, ALPS, and how much each is worth."""

import pytest
import torch

import naive
from penjing.methods import METHODS
from penjing.methods.base import LinearInput
from penjing.methods.pruning.alps import alps
from penjing.numerics.refit import damped, refit
from penjing.statistics import ColumnNorm, Gram


def exact(weight, gram, kept, damping):
    """Row by row, by the normal equations in fp64."""
    hessian = damped(gram, damping).double()
    result = torch.zeros_like(weight, dtype=torch.float64)
    for row, (given, mask) in enumerate(zip(weight.double(), kept, strict=True)):
        if mask.any():
            result[row, mask] = torch.linalg.solve(hessian[mask][:, mask], (given @ hessian)[mask])
    return result


def loss(weight, values, gram):
    change = weight.double() - values.double()
    return float(((change @ gram.double()) * change).sum())


def problem(rows=10, columns=48, tokens=256):
    inputs = naive.correlated(tokens, columns)
    return naive.random_weight(rows, columns), inputs, inputs.T @ inputs


@pytest.mark.parametrize("damping", [0.01, 0.1])
def test_refit_solves_the_normal_equations(damping):
    weight, _, gram = problem()
    kept = torch.rand(10, 48, generator=torch.Generator().manual_seed(0)) > 0.6
    kept[0], kept[1] = False, True
    found = refit(weight, gram, kept, damping=damping, steps=200)
    torch.testing.assert_close(found.double(), exact(weight, gram, kept, damping), atol=1e-6, rtol=1e-3)
    assert not found[~kept].any()
    torch.testing.assert_close(found[1], weight[1])


def test_every_step_helps():
    weight, _, gram = problem()
    kept = weight.abs() > 0.03
    losses = [loss(weight, refit(weight, gram, kept, damping=0, steps=steps), gram) for steps in (0, 1, 4, 16, 64)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.6 * losses[0]


def test_ugly_statistics():
    weight, inputs, _ = problem(tokens=3)
    inputs[:, 4:8] = 0
    kept = weight.abs() > 0.03
    for gram in (inputs.T @ inputs, torch.zeros(48, 48)):
        found = refit(weight, gram, kept)
        assert torch.isfinite(found).all() and not found[~kept].any()
        assert torch.isfinite(alps(weight, gram, 0.5).dense()).all()
    assert torch.equal(refit(weight, torch.zeros(48, 48), kept), weight * kept)


def test_worked_example():
    weight, gram = torch.tensor([[1.0, 3.0]]), torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    found = alps(weight, gram, 0.5, damping=0, storage_dtype=torch.float32).dense()
    torch.testing.assert_close(found, torch.tensor([[0.0, 4.0]]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_the_order_of_methods(sparsity):
    weight, inputs, gram = problem(64, 128, 1024)
    errors = {}
    for name, keys in (
        ("alps", {}),
        ("wanda", {"refit": True}),
        ("magnitude", {"refit": True}),
        ("sparsegpt", {}),
        ("wanda", {}),
        ("magnitude", {}),
    ):
        method = METHODS[name]
        options = method.options(sparsity=sparsity, **keys)
        statistics = {kind: kind(128) for kind in method.needs(options)}
        for statistic in statistics.values():
            statistic.update(inputs)
        result = method.linear(LinearInput(weight, statistics), options)
        assert float((~result.kept).double().mean()) == pytest.approx(sparsity, abs=0.01)
        errors[name, bool(keys)] = loss(weight, result.dense(), gram)
    assert errors["alps", False] < 0.8 * errors["wanda", True]
    assert errors["wanda", True] < errors["magnitude", True] < errors["magnitude", False]
    assert errors["wanda", True] < errors["wanda", False] < errors["magnitude", False]
    assert errors["sparsegpt", False] < errors["magnitude", False]


def test_alps_keeps_counts_patterns_and_earlier_masks():
    weight, _, gram = problem()
    assert int((~alps(weight, gram, 0.37).kept).sum()) == int(480 * 0.37)
    by_pattern = alps(weight, gram, pattern="2:4")
    assert (by_pattern.kept.view(-1, 4).sum(1) == 2).all()
    kept = weight.abs() > 0.02
    again = alps(weight * kept, gram, 0.6, kept=kept)
    assert not (again.kept & ~kept).any() and int((~again.kept).sum()) == int(480 * 0.6)


def test_needs():
    wanda = METHODS["wanda"]
    assert wanda.needs(wanda.options(sparsity=0.5, refit=True)) == (ColumnNorm, Gram)
    assert METHODS["magnitude"].needs(METHODS["magnitude"].options(sparsity=0.5)) == ()
