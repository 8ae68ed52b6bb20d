"""Inputs rounded as the loader of compressed-tensors rounds them, bit for bit."""

from __future__ import annotations

import pytest
import torch

from penjing.numerics.activations import Activations, round_inputs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [4, 8])
def test_equals_compressed_tensors(dtype, bits):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    args = quantization.QuantizationArgs(num_bits=bits, type="int", symmetric=True, strategy="token", dynamic=True)
    module = torch.nn.Linear(64, 8)
    module.quantization_status = quantization.QuantizationStatus.COMPRESSED
    x = torch.randn(3, 17, 64, generator=torch.Generator().manual_seed(1)) * torch.logspace(-5, 3, 17)[:, None]
    x[0, 0] = 0
    x[1, 2, 5] = 1e4
    x = x.to(dtype)
    assert torch.equal(round_inputs(x, Activations(bits)), forward_quantize(module, x, "input", args))


def test_worked_example():
    x = torch.tensor([[0.0, 1.0, -127.5], [0.0, 0.0, 0.0]])
    assert round_inputs(x, Activations()).tolist() == [[0.0, 1.0, -128.0], [0.0, 0.0, 0.0]]


def test_tokens_do_not_see_each_other():
    x = torch.randn(4, 10, 32, generator=torch.Generator().manual_seed(2))
    alone = torch.stack([round_inputs(token, Activations()) for token in x.reshape(-1, 32)]).reshape(x.shape)
    assert torch.equal(round_inputs(x, Activations()), alone)
    assert torch.equal(round_inputs(x.reshape(-1, 32), Activations()).reshape(x.shape), alone)


KINDS = {
    "per tensor": Activations(granularity="tensor"),
    "asymmetric": Activations(symmetric=False),
    "asymmetric per tensor": Activations(granularity="tensor", symmetric=False),
    "fp8": Activations(kind="float"),
    "static": Activations(dynamic=False, granularity="tensor"),
    "static asymmetric": Activations(dynamic=False, granularity="tensor", symmetric=False),
    "static fp8": Activations(kind="float", dynamic=False, granularity="tensor"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_equals_compressed_tensors(kind, dtype):
    quantization = pytest.importorskip("compressed_tensors.quantization")
    from compressed_tensors.quantization.lifecycle.forward import forward_quantize

    how = KINDS[kind]
    args = quantization.QuantizationArgs(
        num_bits=8, type=how.kind, symmetric=how.symmetric, strategy=how.granularity, dynamic=how.dynamic
    )
    module = torch.nn.Linear(64, 8)
    module.quantization_status = quantization.QuantizationStatus.COMPRESSED
    x = (torch.randn(3, 17, 64, generator=torch.Generator().manual_seed(1)) + 0.4) * torch.logspace(-3, 2, 17)[:, None]
    x = x.to(dtype)
    static = None
    if not how.dynamic:
        static = how.fit(x.min().reshape(1) / 2, x.max().reshape(1) / 3)
        module.input_scale = torch.nn.Parameter(static.scale)
        zero = torch.zeros(1) if static.zero is None else static.zero
        module.input_zero_point = torch.nn.Parameter(zero.to(torch.int8), requires_grad=False)
    assert torch.equal(round_inputs(x, how, static), forward_quantize(module, x, "input", args))


@pytest.mark.parametrize("how", [*KINDS.values(), Activations(), Activations(threshold=1.0)])
def test_rounding_twice_is_rounding_once_and_zero_stays_zero(how):
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(3))
    x[2] = 0
    static = None if how.dynamic else how.fit(torch.tensor([-2.0]), torch.tensor([3.0]))
    once = round_inputs(x, how, static)
    assert torch.equal(once[2], x[2]) and not torch.equal(once, x)
    if static is not None:
        assert torch.equal(round_inputs(once, how, static), once)


def test_fp8_is_e4m3():
    x = torch.tensor([[448.0, 17.0, 0.3, -1.06]])
    assert round_inputs(x, Activations(kind="float")).tolist() == [[448.0, 16.0, 0.3125, -1.0]]


def test_columns_with_outliers_keep_their_values():
    """Section 3 of LLM.int8(): the scale of a token is that of its other columns, |max| / 127."""
    x = torch.tensor([[0.5, -1.0, 60.0], [0.3, 0.1, 2.0]])
    assert Activations(threshold=6.0).outliers(x).tolist() == [False, False, True]
    expected = torch.tensor([[64 / 127, -1.0, 60.0], [0.3, 42 * 0.3 / 127, 2.0]])
    torch.testing.assert_close(round_inputs(x, Activations(threshold=6.0)), expected)
