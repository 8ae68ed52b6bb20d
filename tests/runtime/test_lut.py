"""The look-up kernel against fp64 products, on every path, at odd shapes; what happens without a compiler."""

import copy
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn

from penjing import compiled
from penjing.numerics.binary_coding import BinaryGrid
from penjing.representations import BinaryCoded, Masked, Scheme
from penjing.runtime import look_up, lut, runner_for

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("c++", "g++", "clang++")), reason="no C++ compiler"
)

SHAPES = [(1, 1, None), (17, 33, None), (48, 96, 32), (31, 100, 24), (5, 7, 4), (40, 300, 128), (16, 64, 64)]
"""Outputs, inputs, group size: rows that fill no block, groups that fill no word, a shorter last group."""


def coded(rows, columns, grid, seed=0):
    generator = torch.Generator().manual_seed(seed)
    groups = grid.groups(columns)
    codes = torch.randint(0, 2**grid.bits, (rows, columns), generator=generator).to(torch.uint8)
    alpha = torch.rand(rows, groups, grid.bits, generator=generator).to(grid.scale_dtype)
    offset = None if grid.offset_dtype is None else torch.randn(rows, groups, generator=generator)
    return BinaryCoded(codes, alpha, None if offset is None else offset.to(grid.offset_dtype), grid)


@pytest.fixture(params=["here", "AVX2", "DEFAULT"])
def path(request, monkeypatch):
    """Run a test with what this processor can do, and with the code for lesser ones."""
    here = torch.backends.cpu.get_cpu_capability()
    capability = here if request.param == "here" else request.param
    if capability == "AVX2" and "AVX" not in here:
        pytest.skip("this processor has no AVX2")
    library = compiled.build("lut.cpp", capability)
    monkeypatch.setattr(lut, "kernel", lambda source: library)


@needs_compiler
@pytest.mark.parametrize("bits", range(1, 9))
def test_products(bits, path):
    for rows, columns, size in SHAPES:
        for scale, offset in ((torch.bfloat16, None), (torch.float16, torch.float16), (torch.float32, torch.float32)):
            weight = coded(rows, columns, BinaryGrid(bits, size, scale, offset))
            layer = lut.LUTLinear(weight)
            assert torch.equal(layer.weight, weight.dense())
            for tokens in (1, 3, look_up.MOST_TOKENS + 1):
                x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(tokens))
                expected = x.double() @ weight.dense().double().T
                error = (layer(x) - expected).abs().max() / expected.abs().max()
                assert error < 1e-5, (rows, columns, size, scale, tokens)


@needs_compiler
def test_half_scales_of_every_size():
    """Normal and subnormal fp16."""
    alpha = torch.tensor([6e-8, 3e-5, 6.2e-5, 1.0, 65504.0], dtype=torch.float16)
    grid = BinaryGrid(1, None, torch.float16)
    weight = BinaryCoded(torch.tensor([[1]] * 5, dtype=torch.uint8), alpha.reshape(5, 1, 1), None, grid)
    assert torch.equal(lut.LUTLinear(weight)(torch.ones(1, 1))[0], alpha.float())


@needs_compiler
@pytest.mark.parametrize("tokens", [0, 1, 20])
def test_shapes_dtypes_and_bias(tokens):
    weight, bias = coded(10, 48, BinaryGrid(3, 16)), torch.randn(10)
    layer = lut.LUTLinear(weight, bias)
    x = torch.randn(1, tokens, 48).bfloat16()
    y = layer(x)
    assert (y.shape, y.dtype) == ((1, tokens, 10), torch.bfloat16)
    expected = torch.nn.functional.linear(x.float(), weight.dense(), bias)
    torch.testing.assert_close(y.float(), expected, atol=0.1, rtol=0.02)
    aside = torch.randn(48, 3).T
    torch.testing.assert_close(layer(aside), torch.nn.functional.linear(aside, weight.dense(), bias))


@needs_compiler
def test_gradients_copies_casts_and_saving():
    weight = coded(10, 48, BinaryGrid(3, 16, offset_dtype=torch.bfloat16))
    layer = lut.LUTLinear(weight, torch.zeros(10))
    x = torch.randn(2, 48, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, weight.dense().sum(0).expand(2, -1))
    with torch.no_grad():
        expected = layer(x)
        twin = copy.deepcopy(layer)
        del layer
        assert torch.equal(twin(x), expected)
        assert torch.equal(twin.float()(x), expected)
    assert torch.equal(twin.state_dict()["weight"], weight.dense())


@needs_compiler
def test_threads_agree():
    layer = lut.LUTLinear(coded(100, 96, BinaryGrid(2, 32)))
    x, before = torch.randn(2, 96), torch.get_num_threads()
    alone = layer(x)
    try:
        torch.set_num_threads(2)
        assert torch.equal(layer(x), alone)
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_runs_in_place_of_a_linear_where_it_can():
    weight = coded(10, 48, BinaryGrid(3, 16))
    made = runner_for(nn.Linear(48, 10), Scheme(grid=weight.grid), weight)
    assert isinstance(made, lut.LUTLinear)
    assert made.bias is not None
    pruned = Masked(weight, torch.ones(10, 48, dtype=torch.bool))
    assert runner_for(nn.Linear(48, 10), Scheme(grid=weight.grid, sparsity=0.1), pruned) is None


def test_without_a_compiler_one_warning_and_a_dense_layer(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.kernel.cache_clear()
    try:
        weight = coded(10, 48, BinaryGrid(3, 16))
        with pytest.warns(compiled.KernelWarning, match="no-such-compiler"):
            assert runner_for(nn.Linear(48, 10), Scheme(grid=weight.grid), weight) is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            x = torch.randn(3, 48)
            torch.testing.assert_close(lut.LUTLinear(weight)(x), x @ weight.dense().T)
    finally:
        compiled.kernel.cache_clear()


def test_a_compiler_that_fails_is_named(monkeypatch, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho cannot do this >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(compiled.BuildError, match="cannot do this"):
        compiled.build("lut.cpp", "DEFAULT")


@needs_compiler
@pytest.mark.slow
def test_processes_that_build_at_once(tmp_path):
    code = "from penjing import compiled; compiled.build('lut.cpp', 'DEFAULT')"
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    running = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait(timeout=300) for process in running] == [0, 0]
    assert len(list((tmp_path / "penjing").iterdir())) == 1
