"""What the walk measures, against the whole model in one piece and autograd."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import naive
from penjing.checkpoint import open_checkpoint
from penjing.methods.quantization.rtn import rtn
from penjing.models import layout_of
from penjing.numerics.grids import IntegerGrid
from penjing.pipeline.choices import read_choices
from penjing.pipeline.gradients import SEED, squared_gradients
from penjing.pipeline.menu import Menu
from penjing.pipeline.sensitivity import Question, Sensitivity, SensitivityWalk
from penjing.pipeline.stream import StreamedModel
from penjing.pipeline.weights import Weights
from penjing.recipe import load_recipe
from tiny_models import token_windows

RTN: dict[str, Any] = {"steps": [{"method": "rtn", "group_size": 32}], "format": "native"}
TOKENS = token_windows(3, 24)


def silent(*_: object) -> None:
    pass


def engine(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def measured(directory: Path, by: Sensitivity, choices: str, probe: int = 0, **keys: Any) -> tuple[Menu, Any]:
    checkpoint = open_checkpoint(directory)
    layout = layout_of(checkpoint.config, checkpoint.specs())
    menu = Menu.open(checkpoint, layout, load_recipe(RTN | keys), read_choices(choices))
    question = Question(menu.units, menu.plans, by, probe)
    walk = SensitivityWalk(checkpoint, layout, question, TOKENS, dtype=torch.float32, progress=silent)
    return menu, walk.run()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_gradients_are_those_of_autograd(family: str, tiny_model: Any) -> None:
    directory = tiny_model(family)
    checkpoint = open_checkpoint(directory)
    layout = layout_of(checkpoint.config, checkpoint.specs())
    stream = StreamedModel(checkpoint.config, layout, Weights(checkpoint, layout).live)
    inside = {
        index: [
            m.name.removeprefix(layout.block_name(index) + ".") for m in layout.of_block(index) if m.kind == "linear"
        ]
        for index in range(layout.blocks)
    }
    found = squared_gradients(stream, TOKENS, inside, silent)
    model, outputs = engine(directory), {}
    for name in found:
        model.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: outputs.update({name: output})
        )
    generator = torch.Generator().manual_seed(SEED)
    expected: dict[str, list[torch.Tensor]] = {name: [] for name in found}
    for window in TOKENS:
        logits = model(window[None]).logits[0]
        labels = naive.drawn_from(logits.softmax(1), generator)
        chosen = logits.log_softmax(1).gather(1, labels).sum()
        for name, gradient in zip(found, torch.autograd.grad(chosen, [outputs[name] for name in found]), strict=True):
            expected[name].append(gradient[0].double().square())
    for name in found:
        squares = torch.cat(expected[name])
        torch.testing.assert_close(found[name].outputs, squares.sum(0) / squares.sum(), rtol=2e-3, atol=1e-9)
        torch.testing.assert_close(found[name].tokens.double(), squares.sum(1), rtol=2e-3, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_divergence_is_that_of_the_model_with_one_unit_replaced(family: str, tiny_model: Any) -> None:
    directory = tiny_model(family)
    menu, losses = measured(directory, "kl", "2,3,4")
    grid = IntegerGrid(2, 32, scale_dtype=torch.float32)
    with torch.no_grad():
        reference = engine(directory)(TOKENS).logits[:, :-1].double().log_softmax(-1)
        for unit in (0, len(menu.units) - 1):
            model = engine(directory)
            for name in menu.units[unit]:
                weight = model.get_submodule(name).weight
                turned = menu.layout.by_name[name].transposed
                done = rtn(weight.T if turned else weight, grid).dense()
                weight.copy_(done.T if turned else done)
            changed = model(TOKENS).logits[:, :-1].double().log_softmax(-1)
            expected = float((reference.exp() * (reference - changed)).sum(-1).mean())
            assert losses[unit][0] == pytest.approx(expected, rel=1e-2)
            assert losses[unit] == sorted(losses[unit], reverse=True)


def test_the_gradient_estimate_foretells_the_divergence(tiny_model: Any) -> None:
    """At 6 bits changes are small enough for a second-order estimate; outputs and tokens are not quite independent."""
    _, expected = measured(tiny_model("llama"), "gradient", "6,8")
    _, found = measured(tiny_model("llama"), "kl", "6,8")
    ratios = [estimate[0] / truth[0] for estimate, truth in zip(expected, found, strict=True)]
    assert all(0.2 < ratio < 5 for ratio in ratios), ratios
    assert 0.4 < sum(unit[0] for unit in expected) / sum(unit[0] for unit in found) < 2.5


def test_output_errors_are_relative_and_add_up(tiny_model: Any) -> None:
    menu, losses = measured(tiny_model("llama"), "output", "2,8,dense")
    model, inputs = engine(tiny_model("llama")), {}
    down = next(unit for unit in range(len(menu.units)) if menu.units[unit] == ("model.layers.1.mlp.down_proj",))
    linear = model.get_submodule(menu.units[down][0])
    linear.register_forward_pre_hook(lambda _, args: inputs.update(x=args[0]))
    with torch.no_grad():
        model(TOKENS)
        done = rtn(linear.weight, IntegerGrid(2, 32, scale_dtype=torch.float32)).dense()
        expected = (inputs["x"] @ (linear.weight - done).T).square().sum() / (
            inputs["x"] @ linear.weight.T
        ).square().sum()
    assert losses[down][0] == pytest.approx(float(expected), rel=1e-4)
    assert losses[down][2] == 0


@pytest.mark.parametrize("by", ["output", "gradient", "kl"])
def test_experts_that_no_token_reaches(by: Sensitivity, tiny_model: Any) -> None:
    """With 64 experts and 72 tokens some get none; every loss is finite all the same."""
    directory = tiny_model("mixtral", num_local_experts=32, num_experts_per_tok=1, layers=1)
    _, losses = measured(directory, by, "2,4")
    assert all(0 <= second <= first < float("inf") for first, second in losses)
