"""SmoothQuant: the formula, what it evens out, and which groups it touches."""

import pytest
import torch
from torch import nn

import naive
from penjing.methods import METHODS
from penjing.methods.base import BlockInput
from penjing.methods.quantization.smoothquant import SmoothQuantOptions, smoothquant
from penjing.models.layout import InputGroup
from penjing.statistics import AbsMax


def test_worked_example():
    scale = smoothquant(torch.tensor([16.0, 1.0]), torch.tensor([1.0, 4.0]), 0.5)
    assert scale.tolist() == [4.0, 0.5]


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 0.85, 1.0])
def test_formula_in_double_precision(alpha):
    activation, weight = torch.rand(50) * 30 + 0.01, torch.rand(50) + 0.01
    expected = [float(a) ** alpha / float(w) ** (1 - alpha) for a, w in zip(activation, weight, strict=True)]
    torch.testing.assert_close(smoothquant(activation, weight, alpha).tolist(), expected, rtol=1e-5, atol=0)


def test_half_makes_both_maxima_equal_and_one_flattens_the_activations():
    activation, weight = torch.rand(20) * 30 + 0.01, torch.rand(20) + 0.01
    half = smoothquant(activation, weight, 0.5)
    torch.testing.assert_close(activation / half, weight * half)
    whole = smoothquant(activation, weight, 1.0)
    torch.testing.assert_close(activation / whole, torch.ones(20))


def test_dead_channels_are_left_alone():
    scale = smoothquant(torch.tensor([0.0, 5.0, 0.0]), torch.tensor([1.0, 0.0, 0.0]), 0.5)
    assert scale.tolist() == [1.0, 1.0, 1.0]
    assert smoothquant(torch.tensor([1e-12]), torch.tensor([1.0]), 0.5).item() == pytest.approx(1e-5)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(12)
        self.query, self.value = nn.Linear(12, 8, bias=False), nn.Linear(12, 8, bias=False)
        self.output = nn.Linear(8, 12, bias=False)


def test_only_groups_fed_by_a_norm_and_the_maximum_over_all_readers():
    block, inputs = Block(), naive.correlated(40, 12)
    after_norm = InputGroup("norm", ("query", "value"), "")
    after_linear = InputGroup("value", ("output",), "output")
    without = InputGroup(None, ("output",), "output")
    seen = AbsMax(12)
    seen.update(inputs)
    statistics = {"query": {AbsMax: seen}, "value": {AbsMax: seen}}
    given = BlockInput(block, [after_norm, after_linear, without], statistics, {})
    scales = METHODS["smoothquant"].transform(given, SmoothQuantOptions(alpha=0.7))
    assert list(scales) == [after_norm]
    widest = torch.cat([block.query.weight, block.value.weight]).detach().abs().amax(0)
    torch.testing.assert_close(scales[after_norm], inputs.abs().amax(0) ** 0.7 / widest**0.3)


def test_function_is_preserved():
    block, inputs = Block().double(), naive.correlated(40, 12).double()
    scale = smoothquant(inputs.abs().amax(0), block.query.weight.detach().abs().amax(0)).double()
    expected = block.query(inputs)
    torch.testing.assert_close((inputs / scale) @ (block.query.weight * scale).T, expected)
