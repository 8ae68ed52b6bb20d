"""Linears that compute with the weight of another one."""

import copy

import pytest
import torch
from torch import nn

from penjing.representations import Dense, LowRank, Scheme
from penjing.runtime import runner_for
from penjing.runtime.shared import SharedLinear


def conv1d(outputs, inputs):
    conv = pytest.importorskip("transformers.pytorch_utils").Conv1D(outputs, inputs)
    nn.init.normal_(conv.bias)
    return conv


def factored(outputs, inputs):
    weight = LowRank(Dense(torch.randn(outputs, 2)), Dense(torch.randn(2, inputs)))
    return runner_for(nn.Linear(inputs, outputs), Scheme(rank=2), weight)


@pytest.mark.parametrize("make", [lambda n, k: nn.Linear(k, n), conv1d, factored])
def test_it_is_the_owner_scaled_with_a_bias_of_its_own(make):
    torch.manual_seed(0)
    owner, x, scale, bias = make(5, 4), torch.randn(3, 4), torch.randn(5), torch.randn(5)
    with torch.no_grad():
        expected = (owner(x) - owner.bias) * scale + bias
        shared = SharedLinear(owner, scale, bias)
        torch.testing.assert_close(shared(x), expected)
        torch.testing.assert_close(SharedLinear(owner)(x), owner(x) - owner.bias)
        weight = shared.weight if shared.weight.shape == (5, 4) else shared.weight.T
        torch.testing.assert_close(x @ weight.T + bias, expected, rtol=1e-4, atol=1e-5)


def test_the_weight_is_in_memory_once_and_written_as_a_dense_model():
    model = nn.ModuleDict({"first": nn.Linear(4, 5)})
    model["second"] = SharedLinear(model["first"], torch.ones(5), None)
    assert [name for name, _ in model.named_parameters()] == ["first.weight", "first.bias"]
    assert sorted(model.state_dict()) == ["first.bias", "first.weight", "second.weight"]
    twin = copy.deepcopy(model)
    assert twin["second"].owner is twin["first"] and twin["first"] is not model["first"]
