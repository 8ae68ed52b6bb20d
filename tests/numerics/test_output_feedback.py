"""Feedback among outputs: a matrix is one long row to plain GPTQ, whose Hessian is the Kronecker product of both."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import naive
from penjing.methods.base import LinearInput
from penjing.methods.quantization.gptq import GPTQOptions, gptq, linear
from penjing.numerics import output_feedback
from penjing.numerics.grids import IntegerGrid
from penjing.numerics.output_feedback import DAMPING, OutputFeedback, output_bounds
from penjing.pipeline import factors
from penjing.representations import Dense, LowRank, Masked
from penjing.statistics import Gram

ROWS, COLUMNS = 6, 8
COMPILERS = pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "in Python"])


class Fixed(IntegerGrid):
    """Steps of a fiftieth wherever it is asked, so that nothing but the order of rounding decides."""

    def fit(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full(weight.shape[:-1], 0.02), torch.zeros(weight.shape[:-1])


GRID = Fixed(5, None, True, "narrow", torch.float32)


def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_feedback, "helper", lambda *_: None)


def problem(seed: int = 0, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor]:
    """Weight (N, K), Gram matrix of inputs, and one of gradients in which outputs matter less and less."""
    inputs = naive.correlated(200, COLUMNS, seed=seed, mix=0.4)
    gradients = naive.correlated(300, rows, seed=seed + 50, mix=0.6)
    gram = gradients.T @ gradients
    order = gram.diagonal().argsort(descending=True)
    return naive.random_weight(rows, COLUMNS, seed=seed + 1), inputs.T @ inputs, gram[order][:, order]


def one_long_row(weight: Tensor, hessian: Tensor, outer: Tensor, kept: Tensor | None = None) -> Tensor:
    """Values by elimination in fp64, column after column and from the first output to the last in each."""
    rows, columns = weight.shape
    alive = torch.ones(rows * columns) if kept is None else kept.T.flatten()

    def fix(position: int, current: Tensor, _: object) -> Tensor:
        value = float(current[0, position]) * float(alive[position])
        return torch.tensor([0.02 * naive.nearest(value, 0.02, 0, GRID)], dtype=torch.float64)

    values, _ = naive.eliminate(weight.T.reshape(1, -1), torch.kron(hessian, outer), fix)
    return values.reshape(columns, rows).T


def cost(weight: Tensor, values: Tensor, hessian: Tensor, outer: Tensor) -> float:
    difference = (weight - values).double()
    return float(torch.trace(outer.double() @ difference @ hessian.double() @ difference.T))


@COMPILERS
@pytest.mark.parametrize("seed", range(4))
def test_both_sides_equal_one_long_row(seed: int, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        without_compiler(monkeypatch)
    weight, gram, outer = problem(seed)
    hessian, damped = naive.damped(gram, 0.01), naive.damped(outer, DAMPING)
    found = gptq(weight, gram, GRID, order="natural", block_size=3, output_grams=[outer]).dense()
    torch.testing.assert_close(found.double(), one_long_row(weight, hessian, damped), rtol=1e-5, atol=1e-7)


def test_errors_cost_less_than_without() -> None:
    ratios = []
    for seed in range(12):
        weight, gram, outer = problem(seed)
        hessian, damped = naive.damped(gram, 0.01), naive.damped(outer, DAMPING)
        both, one = gptq(weight, gram, GRID, output_grams=[outer]), gptq(weight, gram, GRID)
        ratios.append(cost(weight, both.dense(), hessian, damped) / cost(weight, one.dense(), hessian, damped))
    assert torch.tensor(ratios).log().mean().exp() < 0.95


@COMPILERS
def test_pruned_weights_stay_zero_and_others_make_up_for_them(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        without_compiler(monkeypatch)
    weight, gram, outer = problem(7)
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(3)) > 0.4
    found = gptq(weight, gram, GRID, order="natural", kept=kept, output_grams=[outer])
    assert isinstance(found, Masked)
    assert (found.dense()[~kept] == 0).all()
    expected = one_long_row(weight, naive.damped(gram, 0.01), naive.damped(outer, DAMPING), kept)
    torch.testing.assert_close(found.dense().double(), expected, rtol=1e-5, atol=1e-7)


@COMPILERS
def test_independent_outputs_are_rounded_as_without(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        without_compiler(monkeypatch)
    weight, gram, outer = problem()
    apart = gptq(weight, gram, GRID, output_grams=[outer.diagonal().diag()])
    assert torch.equal(apart.dense(), gptq(weight, gram, GRID).dense())


def test_blocks_do_not_see_each_other() -> None:
    weight, gram, outer = problem(rows=9)
    first, second = outer[:5, :5], outer[5:, 5:]
    together = gptq(weight, gram, GRID, output_grams=[first, second]).dense()
    alone = [gptq(weight[:5], gram, GRID, output_grams=[first]), gptq(weight[5:], gram, GRID, output_grams=[second])]
    assert torch.equal(together, torch.cat([each.dense() for each in alone]))


@COMPILERS
def test_outputs_are_visited_from_the_one_that_matters_most(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not compiled:
        without_compiler(monkeypatch)
    weight, gram, outer = problem()
    shuffled = torch.tensor([3, 0, 5, 1, 4, 2])
    found = gptq(weight[shuffled], gram, GRID, output_grams=[outer[shuffled][:, shuffled]]).dense()
    assert torch.equal(found, gptq(weight, gram, GRID, output_grams=[outer]).dense()[shuffled])


@pytest.mark.parametrize("grid", [
    IntegerGrid(2, 4, False, "full", torch.bfloat16),
    IntegerGrid(4, 4, False, "full", torch.bfloat16, "float"),
    IntegerGrid(4, 4, False, "full", torch.bfloat16, "minimum"),
    IntegerGrid(3, 4, True, "signed-max", torch.float16),
])  # fmt: skip
def test_the_compiled_kernel_does_what_python_does(grid: IntegerGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram, outer = problem(5)
    fast = gptq(weight, gram, grid, output_grams=[outer])
    without_compiler(monkeypatch)
    assert torch.equal(gptq(weight, gram, grid, output_grams=[outer]).dense(), fast.dense())


def test_independent_outputs_on_a_grid_with_minima_are_rounded_to_nearest() -> None:
    grid = IntegerGrid(4, 8, False, "full", torch.float32, "minimum")
    weight, gram, outer = problem(2)
    apart = gptq(weight, gram, grid, output_grams=[outer.diagonal().diag()])
    assert torch.equal(apart.dense(), gptq(weight, gram, grid).dense())


def test_worked_example() -> None:
    whole = Fixed(8, None, True, "narrow", torch.float32)
    column, step = torch.tensor([0.6, 0.8]), torch.ones(2)
    damping = output_feedback.DAMPING
    undamped = torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    gram = undamped - damping * undamped.diagonal().mean() / (1 + damping) * torch.eye(2)
    assert OutputFeedback([gram], whole).encode(column, step, torch.zeros(2)).tolist() == [1.0, 0.0]


@pytest.mark.parametrize(("outputs", "bounds"), [(1, [0, 1]), (1536, [0, 1536]), (1537, [0, 768, 1537]),
                                                 (4096, [0, 1365, 2730, 4096])])  # fmt: skip
def test_wide_matrices_are_cut_into_equal_blocks(outputs: int, bounds: list[int]) -> None:
    assert output_bounds(outputs) == bounds


@pytest.mark.parametrize("kind", ["zero", "rank one", "tiny"])
def test_thin_gradients_give_a_finite_answer(kind: str) -> None:
    weight, gram, outer = problem()
    vector = torch.arange(1.0, ROWS + 1)
    poor: dict[str, Any] = {"zero": outer * 0, "rank one": torch.outer(vector, vector), "tiny": outer * 1e-30}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = gptq(weight, gram, GRID, output_grams=[poor[kind]])
    assert found.dense().isfinite().all()
    if kind == "zero":
        assert torch.equal(found.dense(), gptq(weight, gram, GRID).dense())


@pytest.mark.parametrize(("keys", "message"), [({"descent": 2}, "one by one"), ({"type": "nf4"}, "rounds to integers")])
def test_what_does_not_go_with_it_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTQOptions.model_validate({"two_sided": True, **keys})


def test_a_type_of_gguf_that_does_not_divide_falls_back_and_goes_without() -> None:
    options = GPTQOptions.model_validate({"two_sided": True, "type": "q4_k"}).for_matrix((8, 96), torch.float16)
    weight, _, outer = problem(rows=8)
    weight = weight.repeat(1, 12)
    gram = naive.correlated(300, 96, mix=0.05)
    given = LinearInput(weight, {Gram: Gram.known(gram.T @ gram, 300)}, output_grams=[outer])
    without = linear(replace(given, output_grams=()), options)
    assert torch.equal(linear(given, options).dense(), without.dense())


def test_gradients_reach_the_right_factor_through_the_left_one() -> None:
    left, right = torch.randn(6, 3), torch.randn(3, 8)
    gradients = torch.randn(40, 6)
    whole = gradients.T @ gradients
    seen: list[list[Tensor]] = []

    def method(given: LinearInput) -> Dense:
        seen.append(list(given.output_grams))
        return Dense(given.weight)

    before = LowRank(Dense(left), Dense(right))
    for grams in ([whole], [whole[:2, :2], whole[2:, 2:]], []):
        factors.apply(method, LinearInput(left @ right, {}, output_grams=grams), before)
    reaching = gradients @ left
    torch.testing.assert_close(seen[0], [reaching.T @ reaching])
    apart = [gradients[:, :2] @ left[:2], gradients[:, 2:] @ left[2:]]
    torch.testing.assert_close(seen[2], [sum(each.T @ each for each in apart)])
    assert seen[1] == [whole] and seen[4] == seen[5] == []
