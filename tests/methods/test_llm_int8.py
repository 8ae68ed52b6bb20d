"""LLM.int8(): the worked example, the weights, and what the decomposition buys."""

from __future__ import annotations

import torch
from torch import nn

from penjing.methods.base import LinearInput
from penjing.methods.quantization import llm_int8
from penjing.representations import Scheme
from penjing.runtime import runner_for

OPTIONS = llm_int8.LLMInt8Options(threshold=6.0)


def made(weight: torch.Tensor) -> tuple[nn.Module, torch.Tensor]:
    """The linear that runs, and its decoded weights."""
    coded = llm_int8.linear(LinearInput(weight, {}, storage_dtype=torch.float32), OPTIONS)
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    runner = runner_for(linear, OPTIONS.scheme(Scheme(), torch.float32), coded)
    assert runner is not None
    return runner, coded.dense()


@torch.no_grad()
def test_worked_example():
    runner, decoded = made(torch.tensor([[1.27, 0.5, 0.1]]))
    torch.testing.assert_close(decoded, torch.tensor([[1.27, 0.5, 0.1]]))
    torch.testing.assert_close(runner(torch.tensor([[0.5, -1.0, 60.0]])), torch.tensor([[6.14]]))


def test_weights_are_rounded_by_row_to_127_steps():
    weight = torch.randn(7, 30, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    scale = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=1e-30)
    _, decoded = made(weight)
    torch.testing.assert_close(decoded, (weight / scale).round() * scale, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_outliers_no_longer_spoil_the_other_columns():
    """Two columns 30 times as large as the rest: the error falls by more than half (the paper's figure 1 in small)."""
    generator = torch.Generator().manual_seed(1)
    weight, x = torch.randn(64, 256, generator=generator) / 16, torch.randn(40, 256, generator=generator)
    x[:, [7, 100]] *= 30
    exact = x.double() @ weight.double().T

    def error(threshold: float) -> float:
        runner, _ = made(weight)
        runner.how = type(runner.how)(threshold=threshold)
        return float((runner(x) - exact).norm() / exact.norm())

    assert error(6.0) < 0.5 * error(1e9)


def test_the_scheme_says_what_happens_to_inputs():
    scheme = OPTIONS.scheme(Scheme(), torch.bfloat16)
    assert scheme.activations is not None and scheme.activations.threshold == 6.0
    assert scheme.activations.label == "inputs above 6 dense"
