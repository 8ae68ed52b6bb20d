"""SparseGPT against elimination in fp64, identities, exact counts, joint quantisation."""

import pytest
import torch
from pydantic import ValidationError

import naive
from penjing.errors import RecipeError
from penjing.methods.pruning.magnitude import magnitude
from penjing.methods.pruning.sparsegpt import SparseGPTOptions, sparsegpt
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Dense, Quantized, Scheme

ROWS, COLUMNS = 10, 48


def problem(seed=0, columns=COLUMNS):
    inputs = naive.correlated(256, columns, seed=seed)
    return naive.random_weight(ROWS, columns, seed=seed + 50), inputs.T @ inputs


def prune(weight, gram, sparsity=None, **options):
    return sparsegpt(weight, gram, sparsity, storage_dtype=torch.float32, **options)


def test_worked_example():
    weight, gram = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    result = prune(weight, gram, 0.5, damping=0).dense()
    torch.testing.assert_close(result, torch.tensor([[0.0, 3.0]]))
    assert naive.loss(weight, result, gram) == pytest.approx(1.0)
    assert naive.loss(weight, torch.tensor([[0.0, 2.0]]), gram) == pytest.approx(2.0)


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.75])
@pytest.mark.parametrize("block", [16, 20, 128])
def test_unstructured_equals_reference(sparsity, block):
    weight, gram = problem()
    hessian = naive.damped(gram, 0.01)
    expected, kept, total = naive.sparsegpt(weight, hessian, sparsity=sparsity, block=block)
    result = prune(weight, gram, sparsity, block_size=block)
    assert torch.equal(result.kept, kept)
    torch.testing.assert_close(result.dense().double(), expected, rtol=1e-3, atol=1e-5)
    assert naive.loss(weight, result.dense(), hessian) == pytest.approx(total, rel=1e-3)


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "1:4"])
@pytest.mark.parametrize("block", [8, 30, 128])
def test_patterns_equal_reference(pattern, block):
    weight, gram = problem()
    zeros, of = (int(number) for number in pattern.split(":"))
    expected, kept, _ = naive.sparsegpt(weight, naive.damped(gram, 0.01), zeros_of=(zeros, of))
    result = prune(weight, gram, pattern=pattern, block_size=block)
    assert torch.equal(result.kept, kept)
    torch.testing.assert_close(result.dense().double(), expected, rtol=1e-3, atol=1e-5)
    assert ((result.dense() == 0).view(-1, of).sum(1) == zeros).all()


@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=["half", "2:4"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_joint_quantisation_equals_reference(options, symmetric):
    weight, gram = problem()
    grid = IntegerGrid(4, None, symmetric, "narrow", torch.float32)
    fits = [naive.fit(weight[row], grid) for row in range(ROWS)]

    def rounding(row, column, value):
        scale, zero = fits[row]
        return scale * (naive.nearest(value, scale, zero, grid) - zero)

    hessian = naive.damped(gram, 0.01)
    arguments = {"sparsity": 0.5} if "sparsity" in options else {"zeros_of": (2, 4)}
    expected, kept, _ = naive.sparsegpt(weight, hessian, rounding=rounding, **arguments)
    result = prune(weight, gram, grid=grid, **options)
    assert isinstance(result.values, Quantized)
    assert (result.kept != kept).double().mean() < 0.02
    assert ((result.dense() - expected).abs() > 1e-4).double().mean() < 0.03
    assert naive.loss(weight, result.dense(), hessian) == pytest.approx(naive.loss(weight, expected, hessian), rel=0.02)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [8, 20, None, "tensor"])
@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=["half", "2:4"])
def test_quantised_survivors_lie_on_the_grid_and_the_mask_survives(symmetric, size, options):
    weight, gram = problem()
    result = prune(weight, gram, grid=IntegerGrid(4, size, symmetric, "full", torch.bfloat16), **options)
    assert (result.values.dense()[~result.kept] == 0).all()
    assert result.values.codes.dtype == torch.int8 and result.values.scale.dtype == torch.bfloat16
    assert naive.loss(weight, result.dense(), gram) < naive.loss(weight, torch.zeros_like(weight), gram)


@pytest.mark.parametrize("sparsity", [0.1, 0.37, 0.5, 0.99])
def test_count_per_block_is_exact(sparsity):
    weight, gram = problem(columns=40)
    kept = prune(weight, gram, sparsity, block_size=16).kept
    for start, stop in ((0, 16), (16, 32), (32, 40)):
        assert int((~kept[:, start:stop]).sum()) == int((stop - start) * ROWS * sparsity + 1e-6)


def test_uncorrelated_inputs_make_it_magnitude_within_each_block():
    weight = naive.random_weight(ROWS, COLUMNS)
    result = prune(weight, torch.eye(COLUMNS) * 3, 0.5, block_size=16)
    for first in range(0, COLUMNS, 16):
        expected = magnitude(weight[:, first : first + 16], 0.5, storage_dtype=torch.float32)
        assert torch.equal(result.dense()[:, first : first + 16], expected.dense())
    pattern = prune(weight, torch.eye(COLUMNS) * 3, pattern="2:4")
    assert torch.equal(pattern.dense(), magnitude(weight, pattern="2:4", storage_dtype=torch.float32).dense())


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("options", [{"sparsity": 0.5}, {"pattern": "2:4"}], ids=["half", "2:4"])
def test_updating_beats_masking(seed, options):
    weight, gram = problem(seed)
    result = prune(weight, gram, **options)
    assert naive.loss(weight, result.dense(), gram) < naive.loss(weight, weight * result.kept, gram)


def test_earlier_mask_counts_and_stays():
    weight, gram = problem()
    earlier = magnitude(weight, pattern="2:4").kept
    same = prune(weight, gram, 0.4, kept=earlier)
    assert torch.equal(same.kept, earlier), "half is gone already, 40 % asks for nothing more"
    more = prune(weight, gram, 0.75, kept=earlier)
    assert not (more.kept & ~earlier).any()
    assert int(more.kept.sum()) == weight.numel() // 4


def test_dense_values_are_rounded_inside_the_sweep():
    weight, gram = problem()
    result = sparsegpt(weight, gram, 0.5, storage_dtype=torch.bfloat16)
    assert isinstance(result.values, Dense) and result.values.values.dtype == torch.bfloat16
    late = prune(weight, gram, 0.5).dense().bfloat16()
    assert naive.loss(weight, result.dense(), gram) <= naive.loss(weight, late, gram)


@pytest.mark.parametrize("tokens", [1, 2])
def test_few_tokens_and_dead_columns(tokens):
    inputs = naive.correlated(tokens, COLUMNS)
    inputs[:, 5] = 0
    weight = naive.random_weight(ROWS, COLUMNS)
    result = prune(weight, inputs.T @ inputs, 0.5)
    assert torch.isfinite(result.dense()).all()
    assert int((~result.kept).sum()) == weight.numel() // 2
    assert (result.dense()[:, 5] == 0).all()


def test_options():
    assert SparseGPTOptions(pattern="2:4").scheme(Scheme(), torch.float16) == Scheme(None, 0.5, (2, 4))
    joint = SparseGPTOptions(sparsity=0.5, bits=4, group_size=-1).scheme(Scheme(), torch.float16)
    assert joint.grid == IntegerGrid(4, None, scale_dtype=torch.float16) and joint.sparsity == 0.5
    with pytest.raises(ValidationError, match="multiple of the 8"):
        SparseGPTOptions(pattern="4:8", bits=4, group_size=20)
    with pytest.raises(RecipeError, match="multiple of 4, but is 50"):
        prune(*problem(columns=50), pattern="2:4")
