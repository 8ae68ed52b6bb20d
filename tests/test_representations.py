"""What a weight becomes: decoding number by number, sizes, slices of rows."""

import pytest
import torch

import naive
from penjing.methods.quantization.gptq import gptq
from penjing.methods.quantization.rtn import rtn
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Activations, Dense, Masked, Quantized, Scheme


def quantized(size=4, *, symmetric=True, bits=4, index=False):
    grid = IntegerGrid(bits, size, symmetric, "full", torch.bfloat16)
    weight = naive.random_weight(6, 10)
    if not index:
        return rtn(weight, grid)
    inputs = naive.correlated(50, 10)
    return gptq(weight, inputs.T @ inputs, grid, order="activation", static_groups=False)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("index", [True, False])
@pytest.mark.parametrize("size", [4, 5])
def test_decoding_number_by_number(symmetric, index, size):
    value = quantized(size, symmetric=symmetric, index=index)
    dense = value.dense()
    assert dense.dtype == torch.float32 and dense.shape == value.shape
    for row in range(6):
        for column in range(10):
            group = int(value.group_index[column]) if index else column // size
            zero = 0 if symmetric else int(value.zero_point[row, group])
            expected = (int(value.codes[row, column]) - zero) * float(value.scale[row, group])
            assert float(dense[row, column]) == expected


def test_sizes():
    dense = Dense(torch.zeros(6, 10, dtype=torch.bfloat16))
    assert dense.nbytes() == 120
    assert quantized().nbytes() == 30 + 6 * 3 * 2
    assert quantized(symmetric=False).nbytes() == 30 + 6 * 3 * 2 + 9
    assert quantized(None, bits=3).nbytes() == 23 + 6 * 2
    assert quantized("tensor", symmetric=False).nbytes() == 30 + 2 + 1
    assert quantized(index=True).nbytes() == 30 + 36 + 40
    kept = torch.zeros(6, 10, dtype=torch.bool)
    kept[:, ::2] = True
    assert Masked(dense, kept).nbytes() == 8 + 60
    assert Masked(quantized(), kept).nbytes() == 8 + 15 + 36


def test_mask_zeroes():
    kept = torch.rand(6, 10) > 0.5
    for values in (Dense(torch.ones(6, 10)), quantized(symmetric=False)):
        masked = Masked(values, kept)
        assert masked.shape == (6, 10)
        assert (masked.dense()[~kept] == 0).all()
        assert torch.equal(masked.dense()[kept], values.dense()[kept])


@pytest.mark.parametrize("index", [True, False])
def test_rows_decode_like_the_whole(index):
    whole = quantized(symmetric=False, index=index)
    kept = torch.rand(6, 10) > 0.5
    for value in (whole, Dense(whole.dense()), Masked(whole, kept)):
        torch.testing.assert_close(value.rows(2, 5).dense(), value.dense()[2:5], rtol=0, atol=0)
    assert isinstance(Masked(whole, kept).rows(2, 5).values, Quantized)


def test_scheme_is_dense_until_something_is_done():
    assert Scheme().dense
    changes = ({"grid": IntegerGrid()}, {"sparsity": 0.5}, {"pattern": (2, 4)}, {"activations": Activations()})
    assert not any(Scheme(**change).dense for change in changes)
