"""The ternary kernel against fp64 products, on every path, at odd shapes."""

import copy
import shutil

import pytest
import torch
from torch import nn

from penjing import compiled
from penjing.numerics.grids import IntegerGrid
from penjing.numerics.ternary import TernaryGrid
from penjing.representations import Activations, Quantized, Scheme
from penjing.runtime import can_run, look_up, runner_for, ternary
from penjing.runtime.int8 import Int8Linear

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
)

SHAPES = [(1, 1, None), (17, 33, None), (70, 100, 24), (5, 7, 4), (130, 300, 128), (64, 36, 18)]
"""Outputs, inputs, group size: rows that fill no block, groups that fill no word, a shorter last group."""


def coded(rows, columns, grid, seed=0):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (rows, columns), generator=generator, dtype=torch.int8)
    scale = torch.randn(rows, grid.groups(columns), generator=generator).to(grid.scale_dtype)
    return Quantized(codes, scale, None, grid)


@pytest.fixture(params=["here", "DEFAULT"])
def path(request, monkeypatch):
    """Run a test with what this processor can do, and with the code for lesser ones."""
    capability = torch.backends.cpu.get_cpu_capability() if request.param == "here" else request.param
    library = compiled.build("ternary.cpp", capability)
    monkeypatch.setattr(ternary, "kernel", lambda source: library)


@needs_compiler
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_products(dtype, path):
    for rows, columns, size in SHAPES:
        weight = coded(rows, columns, TernaryGrid(group_size=size, scale_dtype=dtype))
        layer = ternary.TernaryLinear(weight)
        assert torch.equal(layer.weight, weight.dense())
        for tokens in (0, 1, 3, look_up.MOST_TOKENS + 1):
            x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))
            expected = x.double() @ weight.dense().double().T
            assert layer(x).shape == expected.shape
            if tokens:
                assert (layer(x) - expected).abs().max() / expected.abs().max() < 1e-5, (rows, columns, size, tokens)


@needs_compiler
def test_bias_dtypes_copies_and_threads():
    weight, bias = coded(100, 48, TernaryGrid(group_size=16)), torch.randn(100)
    layer = ternary.TernaryLinear(weight, bias)
    x = torch.randn(1, 2, 48)
    expected = torch.nn.functional.linear(x, weight.dense(), bias)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(layer(x.bfloat16()).float(), expected, atol=0.2, rtol=0.05)
    torch.testing.assert_close(copy.deepcopy(layer)(x), expected)
    alone, before = layer(x), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert torch.equal(layer(x), alone)
    finally:
        torch.set_num_threads(before)
    wanted = x.clone().requires_grad_()
    layer(wanted).sum().backward()
    torch.testing.assert_close(wanted.grad, weight.dense().sum(0).expand(1, 2, -1))


@needs_compiler
def test_runs_in_place_of_a_linear_where_it_can():
    grid = TernaryGrid(group_size=16)
    weight, live = coded(10, 48, grid), nn.Linear(48, 10)
    assert can_run(live, Scheme(grid=grid), weight)
    assert isinstance(runner_for(live, Scheme(grid=grid), weight), ternary.TernaryLinear)
    assert not can_run(live, Scheme(grid=grid, activations=Activations()), weight), "groups are not summed in int32"
    whole = coded(10, 48, TernaryGrid(group_size=None))
    assert isinstance(runner_for(live, Scheme(grid=whole.grid, activations=Activations()), whole), Int8Linear)
    four = Quantized(weight.codes, weight.scale, None, IntegerGrid(4, 16))
    assert not can_run(live, Scheme(grid=four.grid), four)
