"""LoRA as a step: bases rounded or not, changes that begin with what rounding lost; what was trained is written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from penjing.methods.adaptation.coded_base import CodedLinear
from penjing.methods.adaptation.low_rank_change import Directed, LowRankChange
from penjing.methods.adaptation.task_lora import NF4, LoRAOptions, beginning, train
from penjing.methods.quantization.rtn import rtn
from penjing.methods.training import TrainTask
from penjing.training import Windows
from penjing.training import train as run
from penjing.training.models import zeros_of
from tiny_models import token_windows

pytest.importorskip("accelerate")


def load(directory: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval().requires_grad_(False)


def test_a_linear_of_codes_is_the_linear_of_their_values():
    torch.manual_seed(0)
    coded, bias = rtn(torch.randn(5, 70), NF4), torch.randn(5)
    inputs = torch.randn(3, 70, requires_grad=True)
    linear = CodedLinear(coded, bias)
    wanted = nn.functional.linear(inputs, coded.dense(), bias)
    assert torch.allclose(linear(inputs), wanted, atol=1e-6) and torch.allclose(linear.dense()(inputs), wanted)
    [expected] = torch.autograd.grad(wanted.square().sum(), inputs)
    [found] = torch.autograd.grad(linear(inputs).square().sum(), inputs)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4) and not linear.state_dict()


def test_changes_begin_with_what_rounding_lost():
    torch.manual_seed(0)
    weight = torch.randn(48, 64)

    def left(start: str) -> float:
        begun = beginning(weight, None, LoRAOptions(base="nf4", start=start, rank=8))
        change = 0 if begun.change is None else begun.change[0] @ begun.change[1]
        return float((weight - begun.coded.dense() - change).norm())

    assert left("loftq") <= left("residual") < 0.9 * left("zero")
    with pytest.raises(ValueError, match="goes with `base: nf4`"):
        LoRAOptions(start="loftq")


def test_magnitudes_give_lengths_and_changes_directions():
    """DoRA against the formula in fp64, and its gradient with the norm held constant."""
    torch.manual_seed(0)
    weight = torch.randn(4, 6, dtype=torch.float64)
    change = Directed(weight, 2, 0.5).double()
    assert torch.allclose(change(weight), weight, atol=1e-5)
    nn.init.normal_(change.up)
    moved = weight + 0.5 * change.up @ change.down
    length = moved.norm(dim=1, keepdim=True)
    assert torch.allclose(change(weight), weight.norm(dim=1, keepdim=True) * moved / length, atol=1e-5)
    change(weight).sum().backward()
    outer = (weight.norm(dim=1, keepdim=True) / length).expand_as(weight)
    assert torch.allclose(change.up.grad, 0.5 * outer @ change.down.T, atol=1e-5)


@pytest.mark.parametrize(
    ("family", "keys"),
    [
        ("llama", {}),
        ("llama", {"base": "nf4", "start": "residual"}),
        ("llama", {"base": "nf4", "start": "loftq", "magnitudes": True}),
        ("gpt2", {"base": "nf4", "start": "loftq", "rank_stabilised": True}),
        ("gpt2", {"magnitudes": True}),
        ("mixtral", {"base": "nf4", "start": "residual"}),
    ],
    ids=str,
)
def test_what_is_written_is_what_was_trained(family, keys, tiny_model, tmp_path):
    dense, tokens = load(tiny_model(family)), token_windows(4, 16)
    model = load(tiny_model(family))
    options = LoRAOptions(rank=4, alpha=8, steps=8, batch_size=4, micro_batch=4, learning_rate=1e-2, **keys)
    training = train(TrainTask(model, lambda: dense), options)
    coded = [module for module in model.modules() if isinstance(module, CodedLinear)]
    beside = options.base == "nf4" and not options.magnitudes and family != "gpt2"
    assert bool(coded) == beside
    with torch.enable_grad():
        curve = run(training, Windows(tokens, 4, 4, 0), options, tmp_path, marks={})
    assert curve.losses[-1] < curve.losses[0]
    with torch.no_grad():
        wanted = training.model(tokens).logits
        finished = training.finish()
        assert torch.allclose(finished(tokens).logits, wanted, rtol=1e-4, atol=1e-4)
    assert {name: value.shape for name, value in finished.state_dict().items()} == {
        name: value.shape for name, value in dense.state_dict().items()
    }
    assert not any(isinstance(module, LowRankChange | CodedLinear) for module in finished.modules())


@pytest.mark.parametrize("keys", [{}, {"base": "nf4", "start": "loftq"}, {"magnitudes": True}], ids=str)
def test_zeros_stay(keys, tiny_model, tmp_path):
    model, tokens = load(tiny_model("llama")), token_windows(2, 16)
    weight = model.get_parameter("model.layers.0.mlp.up_proj.weight")
    weight.mul_(weight.abs() > weight.abs().median())
    zeros, before = weight == 0, weight.clone()
    options = LoRAOptions(rank=4, steps=2, batch_size=2, learning_rate=1e-2, **keys)
    training = train(TrainTask(model, lambda: model, zeros_of(model)), options)
    with torch.enable_grad():
        run(training, Windows(tokens, 2, 1, 0), options, tmp_path, marks={})
    after = training.finish().get_parameter("model.layers.0.mlp.up_proj.weight")
    assert bool((after[zeros] == 0).all()) and not torch.equal(after, before)
