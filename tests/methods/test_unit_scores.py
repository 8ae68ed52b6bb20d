"""Scores of units and the refit, against slow fp64 versions and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from naive import correlated, random_weight
from penjing.errors import CalibrationError, RecipeError
from penjing.methods.pruning import llm_pruner
from penjing.methods.pruning.angular_layers import angular_distances, nearest_run
from penjing.methods.pruning.attention_heads import entropy, gates, of_groups
from penjing.methods.pruning.flap import compensation, flap
from penjing.methods.pruning.greedy_layers import greedy
from penjing.methods.pruning.minitron import channel_scores, window_energy
from penjing.methods.pruning.refit import refit, refit_with_bias
from penjing.methods.pruning.replaceme import folded, transform
from penjing.methods.pruning.shortgpt import ShortGPTOptions, select
from penjing.methods.pruning.slicing import normalised_covariance, principal_axes
from penjing.methods.pruning.structured_obs import structured_obs
from penjing.methods.pruning.unit_norms import activation, contribution, magnitude
from penjing.methods.pruning.units import Units, kept_units
from penjing.methods.pruning.wanda_sp import wanda_sp


def as_units(weight: Tensor, size: int) -> Tensor:
    """(N, K) -> (U, N, S)."""
    return weight.view(len(weight), -1, size).permute(1, 0, 2)


@pytest.fixture
def inputs() -> Tensor:
    return correlated(200, 12)


@pytest.fixture
def weight() -> Tensor:
    return random_weight(7, 12)


def error(weight: Tensor, inputs: Tensor, kept: Tensor, new: Tensor) -> float:
    return float((inputs.double() @ weight.double().T - inputs[:, kept].double() @ new.double().T).square().sum())


def test_worked_examples() -> None:
    assert wanda_sp(as_units(torch.tensor([[4.0, -1], [1, 2]]), 1), torch.tensor([[1.0], [64]])).tolist() == [5, 24]
    columns = as_units(torch.tensor([[2.0, 0], [0, 1]]), 1)
    gram = torch.diag(torch.tensor([1.0, 9]))
    assert activation(Units(columns, gram=gram)).tolist() == [1, 3]
    assert contribution(columns, gram).tolist() == [2, 3]
    columns = as_units(torch.tensor([[1.0, 3]]), 1)
    seen = torch.tensor([[5.0, 0], [5, 1], [5, -1]])
    power, mean = seen.square().sum(0).view(2, 1), seen.mean(0).view(2, 1)
    torch.testing.assert_close(flap(columns, power, mean, 3), torch.tensor([0.0, 6], dtype=torch.float64))
    assert compensation(torch.tensor([[1.0, 3]]), torch.tensor([0]), seen.mean(0)).tolist() == [5]
    neuron, gradient = torch.tensor([[[1.0, -1]]]), torch.tensor([[[2.0, 3]]])
    for granularity, expected in (("element", 5.0), ("vector", 1.0)):
        assert llm_pruner.importance([neuron], [gradient], [gradient], granularity=granularity).item() == expected
    focus = torch.tensor([[[[0.5, 0.5]], [[1.0, 0.0]]]])
    torch.testing.assert_close(entropy(focus), torch.tensor([math.log(2), 0], dtype=torch.float64))
    assert of_groups(torch.tensor([1.0, 3, 5, 7]), 2).tolist() == [2, 6]
    two = torch.stack([torch.tensor([[1.0], [-1]]), torch.tensor([[2.0], [2]])])
    assert channel_scores([window_energy(two)]).item() == pytest.approx(math.sqrt(5))
    losses = {3: [0.3, 0.1, 0.2], 2: [0.9, 0.5]}
    assert greedy(3, 2, lambda keep: losses[len(keep)]) == [1, 2]
    assert greedy(3, 1, lambda keep: losses[len(keep)], range(2, 3)) == [2]
    assert select(torch.tensor([0.1, 0.3, 0.2]), ShortGPTOptions(drop=1, protect_first=1)) == [2]
    states = torch.tensor([[[1.0, 0]], [[0.0, 1]], [[0.0, 2]]])
    assert angular_distances(states, 1).tolist() == pytest.approx([0.5, 0])
    assert nearest_run(states, 1) == [1]
    assert nearest_run(states, 1, range(0, 1)) == [0]
    matrix = transform(torch.eye(2), torch.diag(torch.tensor([2.0, 3])), ridge=1e-9)
    torch.testing.assert_close(folded(matrix, torch.ones(2, 1)), torch.tensor([[2.0], [3]]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("size", [1, 3])
def test_scores_against_loops(size: int, weight: Tensor, inputs: Tensor) -> None:
    columns, gram = as_units(weight, size), inputs.T @ inputs
    rows = random_weight(12, 5).view(12 // size, size, 5)
    for unit in range(12 // size):
        mine = slice(unit * size, (unit + 1) * size)
        added = inputs[:, mine].double() @ weight[:, mine].double().T
        assert contribution(columns, gram)[unit].item() == pytest.approx(float(added.norm()), rel=1e-4)
        both = torch.cat([weight[:, mine].flatten(), rows[unit].flatten()]).double()
        assert magnitude(Units(columns, (rows,)), 1)[unit].item() == pytest.approx(float(both.abs().sum()))
        assert magnitude(Units(columns, (rows,)), 2)[unit].item() == pytest.approx(float(both.square().sum()))


def test_gate_gradient_is_the_weights(weight: Tensor, inputs: Tensor) -> None:
    """d loss / d gate of a unit from autograd through a gate, and from the gradient of the weight."""
    gate = torch.ones(4, requires_grad=True)
    leaf = weight.clone().requires_grad_()
    outputs = (inputs * gate.repeat_interleave(3)) @ leaf.T
    (outputs.sin().sum()).backward()
    torch.testing.assert_close(gates(as_units(weight, 3), as_units(leaf.grad, 3)), gate.grad, rtol=1e-3, atol=1e-4)


def test_llm_pruner_is_the_change_of_a_quadratic_loss() -> None:
    """With one text, whose Hessian g g^T the squares stand for, mixed importance is the loss's change w by w."""
    w, g = torch.tensor([[[2.0, -3]]]), torch.tensor([[[0.5, 0.25]]])
    expected = (w * g - 0.5 * w.square() * g.square()).abs().sum()
    assert llm_pruner.importance([w], [g], [g.square()], order="mixed").item() == pytest.approx(float(expected))


def test_refit_is_least_squares(weight: Tensor, inputs: Tensor) -> None:
    kept = torch.tensor([0, 2, 3, 5, 6, 7, 9, 11])
    gram = inputs.double().T @ inputs.double()
    expected = torch.linalg.lstsq(inputs[:, kept].double(), inputs.double() @ weight.double().T).solution.T
    new = refit(weight, gram, kept, ridge=1e-12)
    torch.testing.assert_close(new.double(), expected, rtol=1e-4, atol=1e-6)
    assert error(weight, inputs, kept, refit(weight, gram, kept)) < error(weight, inputs, kept, weight[:, kept])


def test_refit_with_a_bias_leaves_means_to_it(weight: Tensor, inputs: Tensor) -> None:
    inputs, kept, bias = inputs + torch.arange(12.0), torch.arange(0, 12, 2), torch.linspace(-1, 1, 7)
    gram, mean = inputs.double().T @ inputs.double(), inputs.double().mean(0)
    new, shift = refit_with_bias(weight, bias, gram, mean, len(inputs), kept, ridge=1e-12)
    ones = torch.cat([inputs[:, kept].double(), torch.ones(len(inputs), 1, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(ones, inputs.double() @ weight.double().T + bias.double()).solution.T
    torch.testing.assert_close(torch.cat([new, shift[:, None]], 1).double(), expected, rtol=1e-3, atol=1e-4)


def test_refit_of_ugly_inputs(weight: Tensor, inputs: Tensor) -> None:
    kept = torch.arange(6)
    dead = inputs.clone()
    dead[:, :2] = 0
    new = refit(weight, dead.T @ dead, kept)
    assert torch.isfinite(new).all() and torch.equal(new[:, :2], weight[:, :2]), "inputs never seen keep their weights"
    assert torch.equal(refit(weight, torch.zeros(12, 12), kept), weight[:, :6])
    one = inputs[:1]
    assert torch.isfinite(refit(weight, one.T @ one, kept)).all()
    torch.testing.assert_close(refit(weight, inputs.T @ inputs, torch.arange(12)), weight)
    with pytest.raises(CalibrationError, match="not finite"):
        refit(weight, torch.full((12, 12), torch.nan), kept)


@pytest.mark.parametrize("size", [1, 3])
def test_obs_removes_what_an_exhaustive_search_would(size: int, weight: Tensor, inputs: Tensor) -> None:
    gram = inputs.double().T @ inputs.double()
    drop, units = 12 // size // 2, 12 // size
    scores = structured_obs(as_units(weight, size), gram, drop, damping=1e-9)
    gone: list[int] = []
    for _ in range(drop):
        left = [unit for unit in range(units) if unit not in gone]
        losses = {}
        for unit in left:
            kept = torch.tensor([u * size + s for u in left if u != unit for s in range(size)])
            losses[unit] = error(weight, inputs, kept, refit(weight, gram, kept, ridge=1e-12))
        gone.append(min(losses, key=lambda unit: losses[unit]))
    assert scores.argsort()[:drop].tolist() == gone
    assert kept_units(scores, drop).tolist() == [unit for unit in range(units) if unit not in gone]


def test_equal_scores_go_from_the_front() -> None:
    assert kept_units(torch.tensor([1.0, 1, 0, 1]), 2).tolist() == [1, 3]
    assert kept_units(torch.ones(3), 0).tolist() == [0, 1, 2]


def test_no_block_may_be_left() -> None:
    states = torch.randn(4, 2, 3)
    with pytest.raises(RecipeError, match="leaves none of 3 blocks"):
        nearest_run(states, 3)
    with pytest.raises(RecipeError, match="leaves none of 3 blocks"):
        greedy(3, 3, lambda keep: [0.0] * len(keep))


def test_principal_axes_hold_what_varies() -> None:
    states = torch.randn(50, 3) @ torch.randn(3, 8)
    covariance = normalised_covariance(states)
    assert float(covariance.trace()) == pytest.approx(50 * 8, rel=1e-6), "every token has mean square one"
    turned = principal_axes(covariance).apply(states.double())
    assert turned[:, 3:].abs().max() < 1e-5 * turned.abs().max()
    torch.testing.assert_close(turned.norm(dim=1), states.double().norm(dim=1))
    with pytest.raises(CalibrationError):
        principal_axes(covariance * torch.nan)


def test_replaceme_is_least_squares() -> None:
    generator = torch.Generator().manual_seed(0)
    mlp, base, target = (torch.randn(60, 4, generator=generator, dtype=torch.float64) for _ in range(3))
    expected = torch.linalg.lstsq(mlp, target - base).solution
    torch.testing.assert_close(transform(mlp.T @ mlp, mlp.T @ (target - base), ridge=1e-12), expected)
    still = transform(mlp.T @ mlp, mlp.T @ (target - base), ridge=1e12)
    torch.testing.assert_close(still, torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-9)
    assert torch.equal(transform(torch.zeros(2, 2), torch.zeros(2, 2)), torch.eye(2, dtype=torch.float64))
