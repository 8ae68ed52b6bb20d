"""HQQ against a number-by-number reference in fp64, the authors' numbers, and its own promises."""

import numpy
import pytest
import torch

import naive
from penjing.errors import RecipeError
from penjing.methods.quantization.hqq import HQQOptions, hqq, shrink, zero_points
from penjing.methods.quantization.rtn import rtn
from penjing.numerics.grids import IntegerGrid
from penjing.recipe import load_recipe
from penjing.representations import Masked

ROWS, COLUMNS = 6, 40


def options(**keys):
    return HQQOptions(**({"bits": 3, "group_size": 16} | keys))


def reference(values, cost, scale, zero, keys):
    """All zero points on the way for one group, in Python floats."""
    low, high = -(2 ** (keys.bits - 1)), 2 ** (keys.bits - 1) - 1
    beta, found = keys.beta, []
    for _ in range(keys.iterations):
        total = 0.0
        for value, weight in zip(values, cost, strict=True):
            code = min(max(round(value / scale + zero), low), high)
            error = value - scale * (code - zero)
            size = abs(error)
            left = max(size - size ** (keys.norm - 1) / beta, 0) if size else 0
            total += weight * (code - (value - (left if error > 0 else -left)) / scale)
        zero = total / sum(cost)
        beta *= keys.kappa
        found.append(zero)
    return found


@pytest.mark.parametrize("size", [0.05, 1.0, 20.0])
@pytest.mark.parametrize("weighted", [False, True])
def test_steps_equal_reference(size, weighted):
    keys = options(iterations=8, beta=10)
    weight = naive.random_weight(ROWS, 16) * 20 * size
    grid = IntegerGrid(3, None, False, "full", torch.float32, "float")
    cost = torch.rand(ROWS, 16, generator=torch.Generator().manual_seed(0)) + 0.1 if weighted else torch.ones(ROWS, 16)
    scale, zero = grid.fit(weight)
    steps = torch.stack(list(zero_points(weight, scale[:, None], zero[:, None], cost, grid, keys)), 1).squeeze(2)
    for row in range(ROWS):
        parts = (weight[row].tolist(), cost[row].tolist(), scale[row].item(), zero[row].item())
        assert steps[row].tolist() == pytest.approx(reference(*parts, keys), abs=2e-4)


def test_worked_example():
    keys = HQQOptions(bits=2, group_size="channel", iterations=1)
    weight = torch.tensor([[0.0, 1.0, 2.0, 4.0]])
    grid = IntegerGrid(2, None, False, "full", torch.float32, "float")
    start = rtn(weight, grid)
    assert start.dense().tolist()[0] == pytest.approx([0, 4 / 3, 8 / 3, 4])
    result = hqq(weight, keys.model_copy(update={"beta": 1e-9}), storage_dtype=torch.float32)
    assert result.zero_point.item() == pytest.approx(-1.8125)
    assert result.dense().tolist()[0] == pytest.approx([-0.25, 13 / 12, 29 / 12, 3.75])


AUTHORS = [
    (2, 1.0, 96.67302787, [1.708753, 1.51771, 1.77524, 1.461676]),
    (3, 1.0, 224.0808134, [3.586047, 3.739239, 3.397436, 3.155369]),
    (4, 1.0, 482.5370212, [7.887512, 8.057299, 8.032452, 7.324005]),
    (2, 20.0, 97.181005, [1.748444, 1.524718, 1.666497, 1.46841]),
    (3, 20.0, 223.0791021, [3.583363, 3.684292, 3.391237, 3.142934]),
    (4, 20.0, 482.5417109, [7.887512, 8.057299, 8.032452, 7.324005]),
]
"""mobiusml/hqq at e0b1d00, 20 of its proximal steps in fp32: the sum of all 64 zero points of unsigned codes, and four.
Its beta stays 10."""


@pytest.mark.parametrize(("bits", "size", "total", "some"), AUTHORS)
def test_steps_equal_the_authors_code(bits, size, total, some):
    random = numpy.random.RandomState(0)
    weight = torch.from_numpy((random.standard_normal((32, 128)) * 0.05).astype(numpy.float32)) * size
    groups = weight.reshape(-1, 64)
    grid = IntegerGrid(bits, None, False, "full", torch.float32, "float")
    scale, zero = (part.unsqueeze(1) for part in grid.fit(groups))
    *_, last = zero_points(groups, scale, zero, torch.ones_like(groups), grid, HQQOptions(bits=bits, kappa=1))
    unsigned = last.squeeze(1) + 2 ** (bits - 1)
    assert float(unsigned.double().sum()) == pytest.approx(total, abs=0.02)
    assert [float(unsigned[place]) for place in (0, 5, 40, 63)] == pytest.approx(some, abs=1e-3)


@pytest.mark.parametrize(("bits", "known"), [(2, 4.4527e-4), (3, 8.2477e-5), (4, 1.77459e-5)])
def test_loses_no_more_than_the_authors_code(bits, known):
    """Mean squared error of what their 20 steps with early stopping give for the same weights."""
    random = numpy.random.RandomState(0)
    weight = torch.from_numpy((random.standard_normal((32, 128)) * 0.05).astype(numpy.float32))
    result = hqq(weight, HQQOptions(bits=bits, group_size=64), storage_dtype=torch.float32)
    assert float((result.dense() - weight).double().square().mean()) <= known * 1.001


@pytest.mark.parametrize("size", [16, 15, "channel"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_group_is_at_least_as_close_as_rounding(size, dtype):
    weight, keys = naive.random_weight(ROWS, COLUMNS), options(group_size=size)
    result = hqq(weight, keys, storage_dtype=dtype)
    assert result.scale.dtype == result.zero_point.dtype == dtype and result.codes.dtype == torch.int8
    plain = rtn(weight, keys.grid(dtype))
    for group in naive.groups_of(COLUMNS, keys.grid(dtype)):
        members = slice(group.start, group.stop)
        lost = [(part.dense() - weight)[:, members].double().square().sum(1) for part in (result, plain)]
        assert (lost[0] <= lost[1] * (1 + 1e-5)).all()
    assert (result.dense() - weight).square().sum() < 0.97 * (plain.dense() - weight).square().sum()


def test_weights_of_the_inputs_lower_the_error_that_counts():
    inputs = naive.correlated(256, COLUMNS)
    importance = inputs.square().mean(0)
    weight = naive.random_weight(64, COLUMNS)
    plain, weighted = (hqq(weight, options(), importance=cost).dense() for cost in (None, importance))

    def lost(result):
        return float(((result - weight).square() * importance).sum())

    assert lost(weighted) < 0.95 * lost(plain)


def test_masked_weights_are_zero_and_do_not_count():
    weight = naive.random_weight(ROWS, COLUMNS)
    kept = torch.ones_like(weight, dtype=torch.bool)
    kept[:, ::3] = False
    result = hqq(weight, options(), kept=kept)
    assert isinstance(result, Masked) and (result.dense()[~kept] == 0).all()
    changed = torch.where(kept, weight, 50)
    assert torch.equal(hqq(changed, options(), kept=kept).dense(), result.dense())


@pytest.mark.parametrize("value", [0.0, 0.3, -0.3, 1e-42, 1e30])
@pytest.mark.parametrize("importance", [None, torch.zeros(COLUMNS)])
def test_ugly_weights_stay_finite(value, importance):
    weight = torch.full((3, COLUMNS), value)
    result = hqq(weight, options(), importance=importance).dense()
    assert torch.isfinite(result).all()
    torch.testing.assert_close(result, weight, rtol=0.02, atol=1e-30)


def test_no_iterations_round_to_nearest():
    weight = naive.random_weight(ROWS, COLUMNS)
    keys = options(iterations=0)
    assert torch.equal(hqq(weight, keys).dense(), rtn(weight, keys.grid(torch.bfloat16)).dense())


def test_shrinking_keeps_signs_and_removes_what_is_small():
    error = torch.tensor([-2.0, -0.01, 0.0, 0.01, 2.0])
    assert shrink(error, 10, 0.7).tolist() == pytest.approx([-2 + 2**-0.3 / 10, 0, 0, 0, 2 - 2**-0.3 / 10])


def test_one_zero_point_per_matrix_is_refused():
    step = {"method": "hqq", "group_size": "tensor"}
    with pytest.raises(RecipeError, match="per group or row"):
        load_recipe({"version": 1, "steps": [step], "format": "native"})
