"""Folding a scale into its source leaves the function unchanged."""

import pytest
import torch

from penjing.models.layout import InputGroup, Layout, ModuleSpec
from penjing.pipeline.fold import fold, foldable, rescale_gradients


def layout(norm_offset: float = 0.0) -> Layout:
    return Layout("test", "test", (), "layers", (), tied=False, norm_offset=norm_offset)


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_into_a_norm(offset):
    x = torch.randn(5, 6, dtype=torch.float64)
    tensors = {
        "norm.weight": torch.randn(6, dtype=torch.float64),
        "norm.bias": torch.randn(6, dtype=torch.float64),
        "up.weight": torch.randn(4, 6, dtype=torch.float64),
        "gate.weight": torch.randn(4, 6, dtype=torch.float64),
    }

    def outputs() -> list[torch.Tensor]:
        normed = x * (tensors["norm.weight"] + offset) + tensors["norm.bias"]
        return [normed @ tensors["up.weight"].T, normed @ tensors["gate.weight"].T]

    before = outputs()
    fold(InputGroup("norm", ("up", "gate"), "mlp"), torch.rand(6) + 0.5, tensors, layout(offset))
    torch.testing.assert_close(outputs(), before)


def test_into_a_linear_with_a_bias():
    x = torch.randn(5, 3, dtype=torch.float64)
    tensors = {
        "up.weight": torch.randn(4, 3, dtype=torch.float64),
        "up.bias": torch.randn(4, dtype=torch.float64),
        "down.weight": torch.randn(2, 4, dtype=torch.float64),
    }

    def output() -> torch.Tensor:
        return (x @ tensors["up.weight"].T + tensors["up.bias"]) @ tensors["down.weight"].T

    before = output()
    fold(InputGroup("up", ("down",), "down"), torch.rand(4) + 0.5, tensors, layout())
    torch.testing.assert_close(output(), before)


def linear(name: str, outputs: int, inputs: int) -> ModuleSpec:
    return ModuleSpec(name, "linear", 0, {"weight": (outputs, inputs)})


def test_grouped_query_values_cannot_carry_a_scale_per_query_channel():
    modules = {"v": linear("v", 2, 8), "o": linear("o", 8, 8), "wide": linear("wide", 8, 8)}
    assert not foldable(InputGroup("v", ("o",), "o"), modules)
    assert foldable(InputGroup("wide", ("o",), "o"), modules)
    assert not foldable(InputGroup(None, ("o",), "o"), modules)


def test_a_norm_has_one_output_per_channel():
    modules = {"norm": ModuleSpec("norm", "norm", 0, {"weight": (8,)}), "q": linear("q", 16, 8)}
    assert foldable(InputGroup("norm", ("q",), "attention"), modules)


def test_gradients_by_divided_outputs_grow():
    outputs, scale = torch.randn(7, 4, dtype=torch.float64), torch.rand(4) + 0.5
    target = torch.randn(4, 3, dtype=torch.float64)

    def gradients(values: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        leaf = values.requires_grad_()
        return torch.autograd.grad(torch.tanh((leaf * back) @ target).sum(), leaf)[0]

    before, after = gradients(outputs, torch.ones(4)), gradients((outputs.detach() / scale), scale)
    grams = [(before.T @ before)[:2, :2], (before.T @ before)[2:, 2:]]
    rescale_gradients(grams, scale)
    expected = after.T @ after
    torch.testing.assert_close(grams, [expected[:2, :2], expected[2:, 2:]])
    rescale_gradients((), scale)
