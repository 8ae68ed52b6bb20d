"""BCQ: what each objective minimises, exact coding of uniform grids, masks, ugly statistics."""

import warnings

import pytest
import torch
from pydantic import ValidationError

import naive
from penjing.methods.base import LinearInput
from penjing.methods.binary_results import from_integer
from penjing.methods.quantization.bcq import BCQOptions, bcq, bcq_output, linear
from penjing.methods.quantization.gptq import gptq
from penjing.methods.quantization.rtn import rtn
from penjing.numerics.binary_coding import BinaryGrid
from penjing.numerics.cholesky import DampingWarning
from penjing.numerics.grids import IntegerGrid
from penjing.representations import BinaryCoded, Masked, Scheme
from penjing.statistics import Gram


def problem(seed=0, rows=24, columns=80, tokens=256):
    inputs = naive.correlated(tokens, columns, seed=seed)
    return naive.random_weight(rows, columns, seed=seed + 100).float(), (inputs.T @ inputs).float()


def loss(weight, coded, gram):
    change = (weight - coded.dense()).double()
    return float(((change @ gram.double()) * change).sum())


def test_worked_example():
    weight, gram = torch.tensor([[1.0, 0.6]]), torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    grid = BinaryGrid(1, None, torch.float32)
    assert loss(weight, bcq_output(weight, gram, grid, rounds=0, turns=0, damping=0), gram) == pytest.approx(0.04)
    turned = bcq_output(weight, gram, grid, rounds=0, turns=1, damping=0)
    assert float(turned.alpha) == pytest.approx(0.84, abs=1e-4)
    assert loss(weight, turned, gram) == pytest.approx(0.032, abs=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("offset", [None, torch.bfloat16])
def test_looking_at_the_output_pays(bits, offset):
    weight, gram = problem(tokens=1024)
    grid = BinaryGrid(bits, 32, offset_dtype=offset)
    plain = loss(weight, bcq(weight, grid), gram)
    inputs = loss(weight, bcq(weight, grid, importance=gram.diagonal()), gram)
    output = loss(weight, bcq_output(weight, gram, grid), gram)
    assert output < 0.8 * min(plain, inputs)
    if bits in (2, 3):
        assert output < 0.9 * loss(weight, gptq(weight, gram, IntegerGrid(bits, 32, offset is None)), gram)


def test_an_identity_gram_needs_no_feedback():
    weight, _ = problem()
    grid = BinaryGrid(2, 16, torch.float32)
    torch.testing.assert_close(
        bcq_output(weight, torch.eye(80), grid, rounds=3, turns=0).dense(), bcq(weight, grid, rounds=3).dense()
    )


def test_what_is_stored_is_what_was_fitted():
    weight, gram = problem(columns=72)
    coded = bcq_output(weight, gram, BinaryGrid(3, 32, offset_dtype=torch.bfloat16))
    assert coded.codes.dtype == torch.uint8
    assert int(coded.codes.max()) < 8
    assert coded.alpha.shape == (24, 3, 3)
    assert coded.alpha.dtype == torch.bfloat16
    assert coded.offset.shape == (24, 3)
    naive_values = torch.empty(24, 72, dtype=torch.float64)
    for n in range(24):
        for k in range(72):
            terms = [
                float(coded.alpha[n, k // 32, i]) * (1 if int(coded.codes[n, k]) >> i & 1 else -1) for i in range(3)
            ]
            naive_values[n, k] = sum(terms) + float(coded.offset[n, k // 32])
    torch.testing.assert_close(coded.dense().double(), naive_values, atol=1e-6, rtol=1e-6)
    assert torch.equal(coded.rows(3, 7).dense(), coded.dense()[3:7])
    assert coded.nbytes() == 24 * 72 * 3 // 8 + 24 * 3 * 3 * 2 + 24 * 3 * 2


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rule", ["full", "signed-max", "asymmetric"])
def test_uniform_grids_are_coded_exactly(bits, dtype, rule):
    weight, _ = problem(columns=72)
    grid = IntegerGrid(bits, 32, rule != "asymmetric", "full" if rule == "asymmetric" else rule, dtype)
    rounded = rtn(weight, grid)
    coded = from_integer(rounded)
    assert torch.equal(coded.dense(), rounded.dense())
    assert bool((coded.alpha > 0).all())


def test_scattered_groups_cannot_be_coded():
    weight, gram = problem()
    scattered = gptq(weight, gram, IntegerGrid(3, 16), static_groups=False)
    with pytest.raises(ValueError, match="scattered"):
        from_integer(scattered)


@pytest.mark.parametrize("objective", ["weights", "output"])
def test_uniform_levels_are_those_of_rtn_and_gptq(objective):
    weight, _ = problem()
    statistic = Gram(80)
    statistic.update(naive.correlated(256, 80, seed=0).float())
    given = LinearInput(weight, {Gram: statistic})
    options = BCQOptions(bits=3, group_size=16, levels="uniform", objective=objective, offset=True)
    grid = IntegerGrid(3, 16, symmetric=False)
    expected = rtn(weight, grid) if objective == "weights" else gptq(weight, statistic.value, grid)
    result = linear(given, options)
    assert isinstance(result, BinaryCoded)
    assert torch.equal(result.dense(), expected.dense())
    assert result.grid == options.scheme(Scheme(), torch.bfloat16).grid


@pytest.mark.parametrize("objective", ["weights", "output"])
def test_pruned_weights_stay_zero_and_do_not_count(objective):
    weight, gram = problem()
    kept = weight.abs() > weight.abs().median()
    grid = BinaryGrid(2, 16)
    if objective == "weights":
        result, ignorant = bcq(weight, grid, kept=kept), bcq(weight, grid)
    else:
        result, ignorant = bcq_output(weight, gram, grid, kept=kept), bcq_output(weight, gram, grid)
    assert isinstance(result, Masked)
    assert not result.dense()[~kept].any()
    assert loss(weight, result, gram) < loss(weight, Masked(ignorant, kept), gram)


def test_ugly_statistics():
    weight, gram = problem(tokens=3)
    gram[:, 5] = gram[5, :] = 0
    weight[2] = 0
    weight[3] = 0.5
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DampingWarning)
        coded = bcq_output(weight, gram, BinaryGrid(3, 32))
        unseen = bcq_output(weight, torch.zeros(80, 80), BinaryGrid(3, 32))
    assert torch.isfinite(coded.dense()).all()
    assert not coded.dense()[2].any()
    assert torch.isfinite(unseen.dense()).all()


@pytest.mark.parametrize("keys", [{"bits": 1}, {"objective": "inputs"}])
def test_uniform_levels_refuse_what_has_no_uniform_counterpart(keys):
    with pytest.raises(ValidationError, match="uniform levels need"):
        BCQOptions(levels="uniform", **keys)


@pytest.mark.parametrize("keys", [{"bits": 9}, {"bits": 0}, {"group_size": "tensor"}, {"group_size": 1}])
def test_refused_options(keys):
    with pytest.raises(ValidationError):
        BCQOptions(**keys)
