"""Additive codebooks: every step lowers the loss, brute force for one code, exact cases, ugly input."""

import itertools

import pytest
import torch

import naive
from penjing.formats.native.layout import from_parts, parts_bytes, to_parts
from penjing.methods.quantization.gptq import gptq
from penjing.methods.weight_sharing.aqlm import AQLMOptions, _Fit, aqlm
from penjing.numerics.grids import IntegerGrid
from penjing.numerics.vectors import VectorGrid
from penjing.representations import Scheme

FLOAT = torch.float32


def problem(rows=24, columns=32, tokens=300):
    inputs = naive.correlated(tokens, columns)
    return naive.random_weight(rows, columns), inputs.T @ inputs


def test_no_step_raises_the_loss():
    weight, gram = problem()
    fit = _Fit(weight, gram, VectorGrid(2, 3, 4, FLOAT), 0)
    losses = [fit.loss()]
    for step in [fit.improve_codes, fit.improve_books, fit.improve_scales] * 3:
        step()
        losses.append(fit.loss())
    assert all(after <= before * (1 + 1e-5) for before, after in itertools.pairwise(losses)), losses
    assert losses[-1] < 0.7 * losses[0]


def test_a_code_is_the_best_of_all():
    weight, gram = problem(3, 8)
    fit = _Fit(weight, gram, VectorGrid(1, 2, 4, FLOAT), 0)
    fit.improve_codes()
    for row, code in itertools.product(range(3), range(4)):  # the last run was chosen last
        other = fit.codes.clone()
        other[row, 1, 0] = code
        values = fit.grid.decode(other, fit.books, fit.scale)
        assert naive.loss(weight[row : row + 1], values[row : row + 1], gram) >= (1 - 1e-5) * naive.loss(
            weight[row : row + 1], fit.values()[row : row + 1], gram
        )


def test_books_are_a_least_squares_solution():
    weight, gram = problem(10, 8)
    fit = _Fit(weight, gram, VectorGrid(1, 2, 4, FLOAT), 0)
    fit.improve_books(60)
    slope = fit._gather(weight - fit.values())
    assert float(slope.abs().max()) < 1e-2 * float(fit._gather(weight).abs().max())


def test_a_matrix_made_of_few_vectors_is_exact():
    entries, rows = torch.randn(4, 4, generator=torch.Generator().manual_seed(2)), torch.randint(4, (16, 5))
    weight = entries[rows].flatten(1)
    weight /= weight.square().mean(1, keepdim=True).sqrt()
    entries_seen = aqlm(weight * 2, torch.eye(20), VectorGrid(1, 8, 4, FLOAT))
    torch.testing.assert_close(entries_seen.dense(), weight * 2, rtol=1e-3, atol=1e-4)


def test_two_bits_beat_the_integer_grid():
    weight, gram = problem(96, 64)
    coded = aqlm(weight, gram, VectorGrid(2, 4, 4, FLOAT))
    integers = gptq(weight, gram, IntegerGrid(2, 16, scale_dtype=FLOAT))
    assert naive.loss(weight, coded.dense(), gram) < naive.loss(weight, integers.dense(), gram)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cut_runs_dead_inputs_few_tokens(dtype):
    weight, gram = problem(6, 19, tokens=3)
    gram[:, 4] = gram[4] = 0
    weight[2] = 0
    grid = VectorGrid(2, 3, 8, dtype)
    result = aqlm(weight, gram, grid)
    assert result.shape == (6, 19) and torch.isfinite(result.dense()).all()
    assert torch.equal(result.rows(1, 4).dense(), result.dense()[1:4])
    scheme = Scheme(grid)
    parts = to_parts(result, scheme)
    back, read = from_parts(parts, "module")
    assert read == scheme and torch.equal(back.dense(), result.dense())
    assert sum(part.nbytes for part in parts.values()) == parts_bytes((6, 19), scheme, 114, dtype.itemsize)
    assert torch.isfinite(aqlm(weight, torch.zeros_like(gram), grid).dense()).all()


def test_books_have_no_place_for_zeros():
    with pytest.raises(ValueError, match="the only step"):
        AQLMOptions().scheme(Scheme(sparsity=0.5), FLOAT)
    assert VectorGrid(2, 8, 8).bits == 2 and VectorGrid(1, 8, 16).bits == 1
