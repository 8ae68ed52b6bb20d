"""AWQ: the scale search and the clip search against brute force, and what they leave untouched."""

import pytest
import torch
from pydantic import ValidationError
from torch import nn

import naive
from penjing.methods import METHODS
from penjing.methods.base import BlockInput, Call, LinearInput
from penjing.methods.quantization.awq import AWQOptions, awq, awq_scale
from penjing.methods.quantization.rtn import rtn
from penjing.models.layout import InputGroup
from penjing.numerics.clipping import clip_limits
from penjing.numerics.grids import IntegerGrid
from penjing.statistics import MeanAbs, TokenSample

GRID = IntegerGrid(3, 8, False, "full", torch.float32)
COLUMNS = 24


class Gated(nn.Module):
    """Norm, then a gated product of two linears, then one linear: the shape of a Llama MLP."""

    def __init__(self, seed=0, wide=16):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.norm = nn.LayerNorm(COLUMNS)
        self.gate, self.up = nn.Linear(COLUMNS, wide, bias=False), nn.Linear(COLUMNS, wide, bias=False)
        self.down = nn.Linear(wide, COLUMNS, bias=False)
        for parameter in (self.gate.weight, self.up.weight, self.down.weight):
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2

    def forward(self, x, *, twice=False):
        product = torch.sigmoid(self.gate(x)) * self.up(x)
        return (self.down(product) * (2 if twice else 1), None)  # attention returns a tuple too


def inputs_of(tokens=64, seed=0):
    return naive.correlated(tokens, COLUMNS, seed=seed)


def observed(statistic, inputs):
    statistic.update(inputs)
    return statistic


@pytest.mark.parametrize("scaling", ["activation", "duo"])
def test_search_finds_what_brute_force_finds(scaling):
    module, inputs = Gated(), inputs_of()
    calls = [Call((inputs[:32],), {}), Call((inputs[32:],), {"twice": True})]
    activity = inputs.abs().mean(0)
    found = awq(activity, [module.gate, module.up], module, calls, GRID, steps=10, scaling=scaling)

    gate, up, down = (layer.weight.detach().double() for layer in (module.gate, module.up, module.down))
    both = torch.cat([gate, up]).abs().view(-1, COLUMNS // 8, 8)
    level = (both / both.amax(-1, keepdim=True)).view(-1, COLUMNS).mean(0)

    def output(gate, up, x):
        return (torch.sigmoid(x.double() @ gate.T) * (x.double() @ up.T)) @ down.T

    def error(scale):
        lossy = [naive.rtn((weight * scale).float(), GRID) / scale for weight in (gate, up)]
        change = [output(*lossy, part) - output(gate, up, part) for part in (inputs[:32], inputs[32:])]
        return float(change[0].square().sum() + 4 * change[1].square().sum())

    candidates = [torch.ones(COLUMNS, dtype=torch.float64)]
    for step in range(10):
        scale = activity.double() ** (step / 10)
        if scaling == "duo":
            scale = scale / (level ** (1 - step / 10) + 1e-4)
        candidates.append(scale / (scale.max() * scale.min()).sqrt())
    best = min(candidates, key=error)
    torch.testing.assert_close(found.double(), best, rtol=1e-3, atol=1e-5)
    assert error(found.double()) <= error(candidates[0]) * (1 + 1e-6)
    assert not torch.equal(found, torch.ones(COLUMNS)), "on inputs with an outlier some scaling must win"


def test_worked_example_of_the_scale():
    torch.testing.assert_close(awq_scale(torch.tensor([4.0, 1.0]), 0.5), torch.tensor([2**0.5, 0.5**0.5]))


def test_scale_of_dead_channels_is_one():
    scale = awq_scale(torch.tensor([4.0, 0.0, 1.0]), 0.5)
    torch.testing.assert_close(scale, torch.tensor([2**0.5, 1.0, 0.5**0.5]))
    assert torch.equal(awq_scale(torch.zeros(3), 0.5), torch.ones(3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_are_restored_also_after_a_failure(dtype):
    module, inputs = Gated().to(dtype), inputs_of().to(dtype)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    linears = [module.gate, module.up]
    awq(inputs.float().abs().mean(0), linears, module, [Call((inputs,), {})], GRID, steps=3)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())

    calls = 0

    def break_on_second(*_):
        nonlocal calls
        calls += 1
        if calls == 2:
            raise RuntimeError("broken")

    module.register_forward_pre_hook(break_on_second)
    with pytest.raises(RuntimeError, match="broken"):
        awq(inputs.float().abs().mean(0), linears, module, [Call((inputs,), {})], GRID, steps=3)
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())


class Transposed(nn.Module):
    """Stores its weight (inputs, outputs), as GPT-2's Conv1D does."""

    def __init__(self, linear):
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().T.contiguous())

    def forward(self, x):
        return x @ self.weight


def test_transposed_linears_give_the_same_scale():
    inputs = inputs_of()
    linear = nn.Linear(COLUMNS, 10, bias=False)
    transposed = Transposed(linear)
    activity, calls = inputs.abs().mean(0), [Call((inputs,), {})]
    expected = awq(activity, [linear], linear, calls, GRID)
    torch.testing.assert_close(awq(activity, [transposed], transposed, calls, GRID), expected)


def test_transform_takes_foldable_groups_only():
    module, inputs = Gated(wide=16), inputs_of()
    narrow = nn.Linear(COLUMNS, 8, bias=False)  # grouped-query: fewer outputs than its reader has inputs
    module.add_module("narrow", narrow)
    product = torch.sigmoid(module.gate(inputs)) * module.up(inputs)
    first = InputGroup("norm", ("gate", "up"), "")
    second = InputGroup("up", ("down",), "down")
    grouped = InputGroup("narrow", ("down",), "down")
    nothing = InputGroup(None, ("down",), "down")
    seen, made = observed(MeanAbs(COLUMNS), inputs), observed(MeanAbs(16), product.detach())
    block = BlockInput(
        module,
        [first, second, grouped, nothing],
        {"gate": {MeanAbs: seen}, "up": {MeanAbs: seen}, "down": {MeanAbs: made}},
        {"": [Call((inputs,), {})], "down": [Call((product.detach(),), {})]},
    )
    scales = METHODS["awq"].transform(block, AWQOptions(bits=3, group_size=8, steps=5))
    assert set(scales) == {first, second}
    assert scales[first].shape == (COLUMNS,) and scales[second].shape == (16,)
    assert all((scale > 0).all() and torch.isfinite(scale).all() for scale in scales.values())


@pytest.mark.parametrize("tokens", [4, 64])
@pytest.mark.parametrize("size", [8, 10, None])
@pytest.mark.parametrize("symmetric", [True, False])
def test_clip_search_equals_brute_force(tokens, size, symmetric):
    grid = IntegerGrid(3, size, symmetric, "narrow", torch.float32)
    weight, inputs = naive.random_weight(4, COLUMNS), inputs_of(tokens)
    limits = clip_limits(weight, inputs, grid, steps=20)
    for row in range(4):
        for number, group in enumerate(naive.groups_of(COLUMNS, grid)):
            part, seen = weight[row, group.start : group.stop], inputs[:, group.start : group.stop].double()
            errors = []
            for step in range(10):
                # In fp32: a range clipped on both sides puts the zero point exactly between two codes.
                limit = part.abs().max() * (1 - step / 20)
                clipped = part.clamp(-limit, limit)
                scale, zero = (value.item() for value in grid.fit(clipped))
                codes = [naive.nearest(value, scale, zero, grid) for value in clipped.tolist()]
                lossy = scale * (torch.tensor(codes, dtype=torch.float64) - zero)
                errors.append((float((seen @ (part.double() - lossy)).square().sum()), float(limit)))
            smallest = min(errors)[0]
            chosen = min(errors, key=lambda entry, limit=float(limits[row, number]): abs(entry[1] - limit))
            assert chosen[1] == pytest.approx(float(limits[row, number]), rel=1e-5)
            assert chosen[0] == pytest.approx(smallest, rel=1e-3, abs=1e-9)


def given_linear(weight, inputs, **keys):
    return LinearInput(weight, {TokenSample: observed(TokenSample(COLUMNS), inputs)}, **keys)


def test_rounding_without_clip_is_round_to_nearest():
    weight = naive.random_weight(6, COLUMNS)
    options = AWQOptions(bits=3, group_size=8, clip=False)
    result = METHODS["awq"].linear(LinearInput(weight, {}), options)
    assert torch.equal(result.dense(), rtn(weight, options.grid(torch.bfloat16)).dense())
    assert METHODS["awq"].needs(options) == (MeanAbs,)


def test_clipping_lowers_the_error_of_the_groups_it_was_judged_on():
    weight, inputs = naive.random_weight(16, COLUMNS), inputs_of(32)
    weight[:, 3] *= 4
    options = AWQOptions(bits=2, group_size="channel")
    clipped = METHODS["awq"].linear(given_linear(weight, inputs), options).dense()
    plain = rtn(weight, options.grid(torch.bfloat16)).dense()
    errors = [(inputs @ (weight - result).T).square().sum(0) for result in (clipped, plain)]
    assert (errors[0] <= errors[1] * (1 + 1e-4)).all() and errors[0].sum() < errors[1].sum()


def test_queries_and_keys_are_not_clipped():
    weight, inputs = naive.random_weight(12, COLUMNS), inputs_of(32)
    weight[:, 3] *= 4
    options = AWQOptions(bits=2, group_size="channel")
    parts = (("self_attn.q_proj", 4), ("self_attn.k_proj", 4), ("self_attn.v_proj", 4))
    some = METHODS["awq"].linear(given_linear(weight, inputs, parts=parts), options).dense()
    every = METHODS["awq"].linear(given_linear(weight, inputs), options).dense()
    plain = rtn(weight, options.grid(torch.bfloat16)).dense()
    assert torch.equal(some[:8], plain[:8]) and torch.equal(some[8:], every[8:])
    assert not torch.equal(every[:8], plain[:8])


def test_earlier_mask_survives():
    weight, inputs = naive.random_weight(6, COLUMNS), inputs_of(32)
    kept = weight.abs() > weight.abs().median()
    result = METHODS["awq"].linear(given_linear(weight, inputs, kept=kept), AWQOptions(group_size=8))
    assert (result.values.dense()[~kept] == 0).all()


def test_no_tokens_no_clipping():
    weight = naive.random_weight(3, COLUMNS)
    limits = clip_limits(weight, torch.zeros(0, COLUMNS), GRID)
    assert torch.equal(limits, weight.view(3, -1, 8).abs().amax(-1))


def test_one_scale_for_the_matrix_is_refused():
    with pytest.raises(ValidationError, match="row by row"):
        AWQOptions(group_size="tensor")
    assert AWQOptions().symmetric is False
