"""Learned rounding against its identities, a hand-computed step and an independent gradient."""

from __future__ import annotations

import pytest
import torch

from block_tasks import error, task
from penjing.formats.gguf.types import blocks_of
from penjing.methods.learning import block_loss
from penjing.methods.quantization.autoround import AutoRoundOptions, Rounding, autoround
from penjing.methods.quantization.rtn import rtn
from penjing.numerics.gguf_grids import GGUF_GRIDS
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Masked

GRID = IntegerGrid(3, 8, True, "signed-max", torch.float32)


def options(**keys: object) -> AutoRoundOptions:
    return AutoRoundOptions.model_validate({"bits": 3, "group_size": 8, "batch_size": 6, **keys})


def learnt(given, **keys: object):
    with torch.enable_grad():
        return autoround(given, options(**keys))


def test_one_iteration_is_rounding_to_nearest():
    given = task()
    for name, result in learnt(given, iterations=1).items():
        nearest = rtn(given.weights[name], GRID)
        assert torch.equal(result.codes, nearest.codes) and torch.equal(result.scale, nearest.scale)


@pytest.mark.parametrize("keys", [{}, {"symmetric": False}, {"group_size": "channel"}, {"group_size": 10}, {"bits": 2}])
def test_the_block_comes_closer_to_the_dense_one(keys):
    given, chosen = task(), options(**keys)
    nearest = {name: rtn(w, chosen.grid(torch.float32)).dense() for name, w in given.weights.items()}
    result = learnt(given, iterations=60, **keys)
    assert error(given, {name: r.dense() for name, r in result.items()}) < 0.8 * error(given, nearest)


def test_without_clipping_scales_stay_and_codes_move_by_at_most_one():
    given = task()
    for name, result in learnt(given, iterations=40, clip=False).items():
        nearest = rtn(given.weights[name], GRID)
        assert torch.equal(result.scale, nearest.scale)
        moved = (result.codes.int() - nearest.codes.int()).abs()
        assert moved.max() == 1 and 0 < moved.float().mean() < 0.5


def test_gradients_are_those_of_the_decoded_weight_passed_straight_through():
    given = task()
    linears = {name: Rounding.of(weight, GRID) for name, weight in given.weights.items()}
    block_loss(given, {name: linear.values()[0] for name, linear in linears.items()}, range(6))
    for name, linear in linears.items():
        weights = {key: one.values()[0].detach().double() for key, one in linears.items()}
        leaf = weights[name].requires_grad_()
        states, targets = given.inputs.double(), given.targets.double()
        hidden = torch.nn.functional.silu(states @ weights["up"].T)
        loss = (states + hidden @ weights["down"].T - targets).square().mean()
        (gradient,) = torch.autograd.grad(loss, leaf)
        ratio = linear.weight.double() / GRID.spread(linear.fit.scale, linear.weight.shape[1])
        inside = (ratio.round() >= GRID.low) & (ratio.round() <= GRID.high)
        scale = GRID.spread(linear.fit.scale, linear.weight.shape[1]).double()
        assert torch.allclose(linear.offset.grad.double(), gradient * scale * inside, atol=1e-6)


def test_one_signed_step_by_hand():
    linear = Rounding.of(torch.tensor([[0.4, -1.0]]), IntegerGrid(2, 2, True, "narrow", torch.float32))
    weight, _, _ = linear.values()
    assert weight.tolist() == [[0.0, -1.0]]
    (-weight[0, 0]).backward()  # asks for a larger first weight
    linear.step(0.2, clip=True)
    assert linear.offset[0, 0].item() == pytest.approx(0.2)
    weight, codes, _ = linear.values()
    assert codes.tolist() == [[1.0, -1.0]] and weight[0, 0] > 0


def test_pruned_weights_stay_zero():
    kept = torch.rand(24, 16, generator=torch.Generator().manual_seed(1)) > 0.5
    result = learnt(task(kept=kept), iterations=20)
    assert isinstance(result["up"], Masked) and not result["up"].dense()[~kept].any()


@pytest.mark.parametrize("kind", ["q4_0", "q4_1", "q8_0", "q4_k", "q3_k", "q2_k", "q6_k", "tq2_0"])
def test_grids_of_gguf(kind):
    """The first step is rounding to nearest; learning moves codes by one where it does not clip; bytes come back."""
    grid = GGUF_GRIDS[kind]
    weight = torch.randn(6, 512, generator=torch.Generator().manual_seed(5)) / 16
    linear, nearest = Rounding.of(weight, grid), rtn(weight, grid)
    start = linear.result()
    assert torch.equal(start.codes, nearest.codes) and torch.equal(start.dense(), nearest.dense())
    wanted = weight + 0.2 * nearest.dense().std() * torch.randn(6, 512, generator=torch.Generator().manual_seed(6))
    for _ in range(5):
        (linear.values()[0] - wanted).square().sum().backward()
        linear.step(0.05, clip=True)
    after = linear.result()
    assert not torch.equal(after.dense(), start.dense())
    back = blocks_of(grid).read(blocks_of(grid).write(after), 512)
    assert torch.equal(back.dense(), after.dense())


def test_rows_that_do_not_divide_get_an_even_type():
    chosen = AutoRoundOptions(type="q4_k")
    assert chosen.for_matrix((4, 64), torch.float32).type == "q4_0"
    assert chosen.for_matrix((4, 512), torch.float32).type == "q4_k"
    for wrong in ({"type": "iq4_nl"}, {"type": "nf4"}, {"type": "q4_k", "fallback": "iq4_nl"}):
        with pytest.raises(ValueError, match="even steps"):
            AutoRoundOptions(**wrong)


def test_ugly_weights_give_finite_results():
    given = task()
    given.weights["up"][:4] = 0
    given.weights["up"][4:8] = 0.25
    given.inputs[..., 3] = 0
    for result in learnt(given, iterations=10).values():
        assert torch.isfinite(result.dense()).all()


def test_same_seed_same_result():
    first, second = learnt(task(), iterations=15, batch_size=2), learnt(task(), iterations=15, batch_size=2)
    assert all(torch.equal(first[name].codes, second[name].codes) for name in first)


def test_one_scale_for_the_matrix_is_refused():
    with pytest.raises(ValueError, match="tensor"):
        options(group_size="tensor")
