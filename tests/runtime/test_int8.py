"""Linears that multiply integers against products of decoded numbers in fp64, and against the simulation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from penjing.numerics.activations import Activations, InputScale, round_inputs
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Dense, Masked, Quantized, Scheme
from penjing.runtime import runner_for
from penjing.runtime.int8 import Int8Linear, LLMInt8Linear, float_product, integer_product

GRID = IntegerGrid(8, None, True, "full", torch.float32)
KINDS = {
    "token": Activations(),
    "tensor": Activations(granularity="tensor"),
    "token asymmetric": Activations(symmetric=False),
    "static": Activations(dynamic=False, granularity="tensor"),
    "static asymmetric": Activations(dynamic=False, granularity="tensor", symmetric=False),
    "4 bits": Activations(4),
    "threshold": Activations(threshold=3.0),
}


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights(rows: int, columns: int, grid: IntegerGrid = GRID) -> Quantized:
    weight = numbers(rows, columns, seed=1) / columns**0.5
    scale, zero = grid.fit_rows(weight)
    codes = grid.encode(weight, grid.spread(scale, columns), grid.spread(zero, columns)).to(torch.int8)
    return Quantized(codes, scale.to(grid.scale_dtype), None if grid.symmetric else zero.to(torch.int8), grid)


def static_for(how: Activations, x: Tensor) -> InputScale | None:
    if how.dynamic:
        return None
    scale, zero = how.fit(x.min().reshape(1) * 0.8, x.max().reshape(1) * 0.8)
    return InputScale(scale, None if zero is None else zero.to(torch.int8))


def live(weight: Quantized, bias: bool = True) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias)
    linear.weight.data = weight.dense()
    return linear


@pytest.mark.parametrize("shape", [(1, 32, 16), (16, 33, 7), (40, 64, 24), (3, 1, 5)])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_equals_the_product_of_decoded_numbers(kind, shape):
    rows, columns, outputs = shape
    how, weight = KINDS[kind], weights(outputs, columns)
    x = numbers(rows, columns, seed=2)
    x[0] *= 3
    linear, static = live(weight), static_for(how, x)
    made = runner_for(linear, Scheme(GRID, activations=how), weight, static)
    assert isinstance(made, LLMInt8Linear if how.threshold else Int8Linear)
    rounded = round_inputs(x, how, static)
    expected = rounded.double() @ weight.dense().double().T + linear.bias.double()
    torch.testing.assert_close(made(x), expected.float(), rtol=2e-6, atol=2e-6 * float(expected.abs().max()))
    torch.testing.assert_close(made(x), linear(rounded), rtol=1e-5, atol=1e-5)
    assert torch.equal(made(x.reshape(1, rows, columns))[0], made(x))
    assert not torch.allclose(made(x), linear(x), rtol=1e-5, atol=1e-5) or columns == 1


@torch.no_grad()
def test_worked_example():
    """s = 2 / 127.5, A = (127, -64); t = 1 / 127.5, B = (127, 64): 127 * 127 - 64 * 64 = 12033."""
    codes = torch.tensor([[127, 64]], dtype=torch.int8)
    made = Int8Linear(codes, torch.tensor([[1 / 127.5]]), torch.tensor([0.5]), Activations())
    assert float(made(torch.tensor([[2.0, -1.0]]))) == pytest.approx(12033 * 2 / 127.5**2 + 0.5, rel=1e-6)


@pytest.mark.parametrize("shape", [(1, 8, 8), (17, 16, 8), (5, 2500, 3), (5, 1, 3), (0, 8, 4), (3, 0, 2)])
def test_products_are_exact(shape):
    rows, columns, outputs = shape
    generator = torch.Generator().manual_seed(3)
    left = torch.randint(-128, 128, (rows, columns), dtype=torch.int8, generator=generator)
    right = torch.randint(-128, 128, (outputs, columns), dtype=torch.int8, generator=generator)
    expected = (left.long() @ right.long().T).int()
    assert torch.equal(integer_product(left, right), expected)
    assert torch.equal(float_product(left, right), expected)


def test_products_of_the_largest_codes_are_exact():
    left = torch.full((2, 5000), -128, dtype=torch.int8)
    assert integer_product(left, left).unique().tolist() == [5000 * 2**14]
    assert float_product(left, left).unique().tolist() == [5000 * 2**14]


@torch.no_grad()
def test_masked_weights_and_conv1d():
    weight = weights(12, 16)
    kept = numbers(12, 16, seed=4) > 0
    conv = Conv1D(12, 16)
    conv.weight.data = (weight.dense() * kept).T.contiguous()
    conv.bias.data = numbers(12, seed=5)
    made = runner_for(conv, Scheme(GRID, sparsity=0.5, activations=Activations()), Masked(weight, kept))
    x = numbers(2, 5, 16, seed=6)
    torch.testing.assert_close(made(x), conv(round_inputs(x, Activations())), rtol=1e-5, atol=1e-5)
    assert torch.equal(made.weight, conv.weight)
    assert torch.equal(made.state_dict()["weight"], conv.weight) and set(made.state_dict()) == {"weight", "bias"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_models(dtype):
    weight = weights(24, 64)
    linear = live(weight).to(dtype)
    made = runner_for(linear, Scheme(GRID, activations=Activations()), weight)
    x = numbers(9, 64, seed=7).to(dtype)
    assert made(x).dtype == dtype
    expected = round_inputs(x, Activations()).double() @ weight.dense().double().T + linear.bias.double()
    torch.testing.assert_close(made(x).double(), expected, rtol=0.02, atol=0.02)
    assert made.weight.dtype == dtype


def test_what_is_no_integer_product_stays_dense():
    weight = weights(8, 32)
    linear = live(weight)
    grouped = IntegerGrid(8, 16, True, "full", torch.float32)
    zeros = IntegerGrid(8, None, False, "full", torch.float32)
    assert runner_for(linear, Scheme(grouped, activations=Activations()), weights(8, 32, grouped)) is None
    assert runner_for(linear, Scheme(zeros, activations=Activations()), weights(8, 32, zeros)) is None
    assert runner_for(linear, Scheme(GRID, activations=Activations(kind="float")), weight) is None
    assert runner_for(linear, Scheme(GRID), weight) is None
    assert runner_for(linear, Scheme(activations=Activations()), Dense(weight.dense())) is None


@torch.no_grad()
def test_outlier_columns_are_those_of_the_batch():
    """A token without an outlier is still multiplied densely in the columns where another has one."""
    weight = weights(8, 16)
    how = Activations(threshold=6.0)
    made = runner_for(live(weight, bias=False), Scheme(GRID, activations=how), weight)
    x = numbers(4, 16, seed=8)
    x[2, 5] = 40.0
    rest = x.clone()
    rest[:, 5] = 0
    scale = rest.abs().amax(1, keepdim=True) / 127
    rounded = (rest / scale).round() * scale
    rounded[:, 5] = x[:, 5]
    torch.testing.assert_close(made(x), rounded @ weight.dense().T, rtol=1e-5, atol=1e-5)
    worse = round_inputs(x, Activations()) @ weight.dense().T
    exact = x @ weight.dense().T
    assert (made(x) - exact).norm() < 0.5 * (worse - exact).norm()


@torch.no_grad()
def test_no_tokens_and_tokens_of_zeros():
    weight = weights(8, 16)
    for how in (Activations(), Activations(symmetric=False), Activations(threshold=6.0)):
        made = runner_for(live(weight, bias=False), Scheme(GRID, activations=how), weight)
        assert made(torch.zeros(0, 16)).shape == (0, 8)
        assert torch.equal(made(torch.zeros(3, 16)), torch.zeros(3, 8))


@torch.no_grad()
def test_moves_and_prints():
    weight = weights(8, 16)
    made = runner_for(live(weight), Scheme(GRID, activations=Activations()), weight)
    assert made.double().codes.dtype == torch.int8
    assert "in_features=16, out_features=8" in repr(made)
