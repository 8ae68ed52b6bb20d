"""Inputs rounded as the loader of compressed-tensors rounds them, bit for bit."""

from __future__ import annotations

import pytest
import torch

from penjing.numerics.activations import activation_fake_quant


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
    assert torch.equal(activation_fake_quant(x, bits), forward_quantize(module, x, "input", args))


def test_worked_example():
    x = torch.tensor([[0.0, 1.0, -127.5], [0.0, 0.0, 0.0]])
    assert activation_fake_quant(x).tolist() == [[0.0, 1.0, -128.0], [0.0, 0.0, 0.0]]


def test_tokens_do_not_see_each_other():
    x = torch.randn(4, 10, 32, generator=torch.Generator().manual_seed(2))
    alone = torch.stack([activation_fake_quant(token) for token in x.reshape(-1, 32)]).reshape(x.shape)
    assert torch.equal(activation_fake_quant(x), alone)
    assert torch.equal(activation_fake_quant(x.reshape(-1, 32)).reshape(x.shape), alone)
