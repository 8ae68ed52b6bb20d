"""Round to nearest: every grid against the number-by-number reference, masks, ugly weights."""

from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError

import naive
from penjing.methods import METHODS
from penjing.methods.base import LinearInput
from penjing.methods.quantization.hqq import HQQOptions, hqq
from penjing.methods.quantization.rtn import rtn
from penjing.methods.typed_grid import SearchedGridOptions
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Masked, Quantized, Scheme


def test_worked_example():
    weight = torch.tensor([[0.5, -1.5], [1.5, 0.25]])
    result = rtn(weight, IntegerGrid(3, None, True, "narrow"))
    assert result.codes.tolist() == [[1, -3], [3, 0]]
    assert result.dense().tolist() == [[0.5, -1.5], [1.5, 0.0]]


@pytest.mark.parametrize("size", [4, 7, None, "tensor", 64])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_equals_reference(size, symmetric, dtype):
    grid = IntegerGrid(4, size, symmetric, "narrow", dtype)
    weight = naive.random_weight(6, 30)
    result = rtn(weight, grid)
    naive.assert_same_rounding(result.dense(), naive.rtn(weight, grid), weight)
    assert result.codes.dtype == torch.int8 and result.scale.dtype == dtype
    assert (result.zero_point is None) == symmetric
    assert symmetric or result.zero_point.dtype == torch.int8


def test_per_tensor_has_one_scale():
    result = rtn(naive.random_weight(5, 12), IntegerGrid(8, "tensor"))
    assert len(result.scale.unique()) == 1


def test_masked_weights_stay_zero_and_do_not_stretch_the_grid():
    weight = naive.random_weight(4, 16)
    weight[:, 3] = 100
    kept = torch.ones_like(weight, dtype=torch.bool)
    kept[:, 3] = False
    for symmetric in (True, False):
        grid = IntegerGrid(4, 8, symmetric)
        result = rtn(weight, grid, kept=kept)
        assert isinstance(result, Masked) and isinstance(result.values, Quantized)
        assert (result.dense()[:, 3] == 0).all() and (result.values.dense()[:, 3] == 0).all()
        assert torch.equal(result.dense(), rtn(weight * kept, grid).dense())


def test_stacked_rows_equal_separate_linears_exactly_when_declared_so():
    method = METHODS["rtn"]
    top, bottom = naive.random_weight(3, 16), naive.random_weight(5, 16, seed=2) * 3
    for size in (4, "channel", "tensor"):
        options = method.options(bits=3, group_size=size)
        together = method.linear(LinearInput(torch.cat([top, bottom]), {}), options).dense()
        apart = torch.cat([method.linear(LinearInput(part, {}), options).dense() for part in (top, bottom)])
        assert torch.equal(together, apart) == method.row_wise(options)


@pytest.mark.parametrize("weight", [torch.zeros(2, 8), torch.full((2, 8), 1e-42), torch.full((2, 8), 3e38)])
def test_ugly_weights_decode_to_finite_values(weight):
    for symmetric in (True, False):
        assert torch.isfinite(rtn(weight, IntegerGrid(4, 4, symmetric)).dense()).all()


def test_zero_points_of_any_value_lose_least_when_searched():
    """By the mean squares of the inputs: less than whole zero points, and less than HQQ's on the same metric."""
    weight, inputs = naive.random_weight(24, 96), naive.correlated(256, 96)
    importance = inputs.square().sum(0)

    def lost(result):
        return float(((result.dense() - weight).square() * importance).sum())

    whole = IntegerGrid(2, 32, False, scale_dtype=torch.float32)
    free = replace(whole, zero="float")
    fitted = hqq(weight, HQQOptions(bits=2, group_size=32), importance=importance, storage_dtype=torch.float32)
    found = lost(rtn(weight, free, metric=importance))
    assert found < 0.97 * lost(rtn(weight, whole, metric=importance))
    assert found < 0.8 * lost(fitted)


def test_zero_points_of_any_value_belong_to_asymmetric_integers():
    for keys in ({}, {"type": "nf4"}):
        with pytest.raises(ValidationError, match="goes with `symmetric: false` and type int"):
            SearchedGridOptions(zero="float", **keys)
    options = SearchedGridOptions(symmetric=False, zero="float")
    assert options.scheme(Scheme(), torch.bfloat16).grid.label == "g128 asymmetric, float zero"
