"""Training of scales: codes stay, gradients are right, the loss falls."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from penjing.methods.base import ModelTask
from penjing.methods.quantization.e2e_qp import E2EOptions, Scaled, rate, trainable, tune
from penjing.methods.quantization.rtn import rtn
from penjing.numerics import strips
from penjing.numerics.float_grids import FloatGrid
from penjing.numerics.gguf_grids import GGUF_GRIDS
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Dense, Masked, Representation

GRID = IntegerGrid(3, 8, True, "signed-max", torch.float32)


def model(seed: int = 0, **weights: Representation) -> tuple[ModelTask, Callable[[], list[float]]]:
    """Norm, linear, softmax: a task whose loss is the KL between the dense and the quantised one."""
    generator = torch.Generator().manual_seed(seed)
    matrix, norm = torch.randn(12, 16, generator=generator), torch.rand(16, generator=generator) + 0.5
    inputs = torch.randn(4, 10, 16, generator=generator)
    wanted = (inputs * norm @ matrix.T).log_softmax(-1)
    coded = weights.get("linear", rtn(matrix, GRID))
    seen: list[float] = []

    def loss(batch: Sequence[int], given: Callable[[str], Tensor | None]) -> float:
        weight, scale = given("linear"), given("norm.weight")
        weight = coded.dense() if weight is None else weight
        got = (inputs[list(batch)] * (norm if scale is None else scale) @ weight.T).log_softmax(-1)
        target = wanted[list(batch)]
        value = (target.exp() * (target - got)).sum(-1).mean()
        value.backward()
        seen.append(value.item())
        return seen[-1]

    return ModelTask({"linear": coded}, {"norm.weight": norm}, 4, loss, told=loss), lambda: seen


@pytest.mark.parametrize("norms", [True, False])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_loss_falls_and_codes_stay(norms, symmetric):
    grid = IntegerGrid(3, 8, symmetric, "full", torch.float32)
    matrix = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    before = rtn(matrix, grid)
    task, losses = model(linear=before)
    heard = []
    options = E2EOptions(iterations=30, batch_size=4, learning_rate=3e-2, norms=norms)
    tuned = tune(task, options, lambda step, loss: heard.append((step, loss)))
    after = tuned.weights["linear"]
    assert losses()[-1] < 0.8 * losses()[0] and heard == list(enumerate(losses()))
    assert torch.equal(after.codes, before.codes) and not torch.equal(after.scale, before.scale)
    assert after.zero_point is before.zero_point
    assert set(tuned.norms) == ({"norm.weight"} if norms else set())


def test_nothing_changes_before_the_first_step():
    weight = rtn(torch.randn(6, 20), IntegerGrid(2, 8, False, "full", torch.bfloat16))
    assert torch.equal(Scaled.of(weight).dense(torch.float32), weight.dense())
    assert torch.equal(Scaled.of(weight).result().scale, weight.scale)


def test_gradient_of_a_factor_is_that_of_its_group_in_fp64():
    weight = rtn(torch.randn(5, 16, generator=torch.Generator().manual_seed(3)), GRID)
    upstream = torch.randn(5, 16, generator=torch.Generator().manual_seed(4))
    scaled = Scaled.of(weight)
    (scaled.dense(torch.float32) * upstream).sum().backward()
    groups = (weight.dense().double() * upstream.double()).reshape(5, 2, 8).sum(-1)
    assert torch.allclose(scaled.factor.grad.double(), groups, atol=1e-5)


@pytest.mark.parametrize("size", [8, 5, None])
@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("kind", ["symmetric", "zero point", "minimum", "nf4"])
def test_gradient_of_scales_whatever_the_groups(monkeypatch, size, ordered, kind):
    """Even groups, a short last one, one per row, columns in another order; and a strip at a time."""
    monkeypatch.setitem(strips.ELEMENTS, "cpu", 40)  # two rows
    zero = "minimum" if kind == "minimum" else "integer"
    integers = IntegerGrid(3, size, kind == "symmetric", "full", torch.float32, zero)
    grid = FloatGrid("nf4", size) if kind == "nf4" else integers
    weight = rtn(torch.randn(5, 16, generator=torch.Generator().manual_seed(3)), grid)
    if ordered:
        columns = torch.randperm(16, generator=torch.Generator().manual_seed(4))
        groups = (torch.arange(16) // grid.columns_per_group(16))[columns]
        weight = replace(weight, group_index=groups.to(torch.int32))
    scale = weight.scale.float().requires_grad_()
    upstream = torch.randn(5, 16, generator=torch.Generator().manual_seed(5)).double()
    values = replace(weight, scale=scale).dense()
    assert torch.equal(values, weight.dense())
    (values * upstream).sum().backward()
    for group in range(scale.shape[1]):
        there = torch.zeros_like(scale).index_fill_(1, torch.tensor([group]), 1.0)
        change = (replace(weight, scale=scale.detach() + there).dense().double() - values.detach().double()) * upstream
        torch.testing.assert_close(scale.grad[:, group], change.sum(1).float(), rtol=1e-4, atol=1e-4)


def test_pruned_weights_stay_zero():
    matrix = torch.randn(12, 16, generator=torch.Generator().manual_seed(0))
    kept = torch.rand(12, 16, generator=torch.Generator().manual_seed(1)) > 0.4
    task, _ = model(linear=rtn(matrix, GRID, kept=kept))
    result = tune(task, E2EOptions(iterations=5, learning_rate=1e-2), lambda step, loss: None).weights["linear"]
    assert isinstance(result, Masked) and not result.dense()[~kept].any()


@pytest.mark.parametrize("kind", ["q4_k", "q3_k", "q6_k", "iq4_nl", "q4_0"])
def test_grids_of_gguf(kind):
    """Codes, and codes of scales, stay; a file's bytes decode to the result."""
    weight = rtn(torch.randn(4, 512, generator=torch.Generator().manual_seed(2)), GGUF_GRIDS[kind])
    scaled = Scaled.of(weight)
    assert torch.equal(scaled.dense(torch.float32), weight.dense())
    with torch.no_grad():
        scaled.factor.copy_(1 + 0.1 * torch.rand(scaled.factor.shape, generator=torch.Generator().manual_seed(3)))
    after = scaled.result()
    assert torch.equal(after.codes, weight.codes) and not torch.equal(after.dense(), weight.dense())
    torch.testing.assert_close(after.dense(), scaled.dense(torch.float32).detach(), rtol=0, atol=0)
    if after.scale_codes is not None:
        assert torch.equal(after.scale_codes.codes, weight.scale_codes.codes)
        assert torch.equal(after.scale_codes.decode(), after.scale)


def test_what_has_no_scales_of_its_own_is_left_alone():
    assert not trainable(Dense(torch.zeros(2, 2)))
    assert not trainable(rtn(torch.randn(4, 8), IntegerGrid(4, "tensor", True, "full", torch.float32)))


def test_the_rate_rises_and_falls_to_nothing():
    rates = [rate(step, 40) for step in range(40)]
    assert rates[0] == pytest.approx(0.25, rel=0.01) and max(rates) == rates[3] and rates[-1] < 0.01
