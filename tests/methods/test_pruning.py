"""Magnitude, Wanda and ShortGPT: masks by brute force, exact counts, patterns, options."""

import itertools

import pytest
import torch
from pydantic import ValidationError

import naive
from penjing.errors import RecipeError
from penjing.methods import METHODS
from penjing.methods.base import LinearInput
from penjing.methods.pruning.magnitude import MagnitudeOptions, magnitude
from penjing.methods.pruning.options import SparsityOptions, parse_pattern
from penjing.methods.pruning.shortgpt import shortgpt
from penjing.methods.pruning.wanda import wanda
from penjing.representations import Scheme
from penjing.statistics import ColumnNorm


def test_magnitude_worked_example():
    first, second = torch.tensor([[1.0, -4.0], [2.0, 3.0]]), torch.tensor([[1.0, -2.0], [4.0, 3.0]])
    assert magnitude(first, 0.5, scope="row").dense().tolist() == [[0, -4], [0, 3]]
    assert magnitude(first, 0.5, scope="layer").dense().tolist() == [[0, -4], [0, 3]]
    assert magnitude(second, 0.5, scope="row").dense().tolist() == [[0, -2], [4, 0]]
    assert magnitude(second, 0.5, scope="layer").dense().tolist() == [[0, 0], [4, 3]]


def test_wanda_worked_example():
    weight, squares = torch.tensor([[4.0, -1.0], [1.0, 2.0]]), torch.tensor([1.0, 64.0])
    assert wanda(weight, squares, 0.5).dense().tolist() == [[0, -1], [0, 2]]
    assert magnitude(weight, 0.5, scope="row").dense().tolist() == [[4, 0], [0, 2]]


@pytest.mark.parametrize("sparsity", [0.1, 0.29, 0.5, 0.9])
def test_counts_are_exact_even_when_all_weights_are_equal(sparsity):
    weight = torch.ones(6, 100)
    assert int((magnitude(weight, sparsity).dense() == 0).sum()) == round(600 * sparsity)
    for result in (magnitude(weight, sparsity, scope="row"), wanda(weight, torch.ones(100), sparsity)):
        assert ((result.dense() == 0).sum(1) == round(100 * sparsity)).all()


def test_layer_scope_removes_the_smallest_of_all():
    weight = naive.random_weight(7, 13)
    result = magnitude(weight, 0.4, storage_dtype=torch.float32)
    gone = weight[~result.kept].abs()
    assert len(gone) == int(91 * 0.4) and gone.max() < weight[result.kept].abs().min()
    assert torch.equal(result.dense(), weight * result.kept)


@pytest.mark.parametrize(("zeros", "of"), [(2, 4), (4, 8), (1, 4)])
def test_patterns_by_brute_force(zeros, of):
    weight, squares = naive.random_weight(3, 2 * of), torch.rand(2 * of) * 9
    scores = weight.abs() * squares.sqrt()
    result = wanda(weight, squares, pattern=f"{zeros}:{of}")
    for row, first in itertools.product(range(3), (0, of)):
        best = max(
            itertools.combinations(range(first, first + of), of - zeros), key=lambda c: scores[row, list(c)].sum()
        )
        assert result.kept[row, first : first + of].nonzero().flatten().add(first).tolist() == list(best)


def test_wanda_with_equal_norms_is_magnitude_by_row():
    weight = naive.random_weight(8, 40)
    for options in ({"sparsity": 0.6}, {"pattern": "2:4"}):
        expected = magnitude(weight, scope="row", **options)
        assert torch.equal(wanda(weight, torch.full((40,), 5.0), **options).kept, expected.kept)


def test_wanda_scores_every_row_on_its_own_and_dead_inputs_go_first():
    weight, squares = naive.random_weight(6, 32), torch.rand(32)
    squares[4] = 0
    result = wanda(weight, squares, 0.25)
    assert ((~result.kept).sum(1) == 8).all() and not result.kept[:, 4].any()
    scaled = wanda(weight * torch.arange(1, 7).unsqueeze(1), squares * 100, 0.25)
    assert torch.equal(scaled.kept, result.kept)


@pytest.mark.parametrize(
    "prune", [magnitude, lambda weight, *a, **k: wanda(weight, torch.ones(weight.shape[1]), *a, **k)]
)
def test_earlier_mask_counts_and_stays(prune):
    weight = naive.random_weight(4, 32)
    earlier = prune(weight, pattern="2:4").kept
    assert torch.equal(prune(weight, 0.25, kept=earlier).kept, earlier)
    more = prune(weight, 0.75, kept=earlier).kept
    assert not (more & ~earlier).any() and int(more.sum()) == 32


def test_stacked_rows_equal_separate_linears_exactly_when_declared_so():
    top, bottom = naive.random_weight(3, 16), naive.random_weight(5, 16, seed=2) * 3
    norm = ColumnNorm(16)
    norm.update(naive.correlated(20, 16))
    cases = [("magnitude", {"sparsity": 0.5}), ("magnitude", {"sparsity": 0.5, "scope": "row"})]
    cases += [("magnitude", {"pattern": "2:4"}), ("wanda", {"sparsity": 0.5}), ("wanda", {"pattern": "4:8"})]
    for name, keys in cases:
        method = METHODS[name]
        options = method.options(**keys)
        together = method.linear(LinearInput(torch.cat([top, bottom]), {ColumnNorm: norm}), options).dense()
        parts = [method.linear(LinearInput(part, {ColumnNorm: norm}), options).dense() for part in (top, bottom)]
        assert torch.equal(together, torch.cat(parts)) == method.row_wise(options), (name, keys)


def test_pattern_must_divide_the_inputs():
    with pytest.raises(RecipeError, match="multiple of 4, but is 10"):
        magnitude(torch.ones(2, 10), pattern="2:4")


@pytest.mark.parametrize("pattern", ["4:4", "0:4", "5:4", "2-4", "two:four", "2:4:8", ""])
def test_unreadable_patterns_are_refused(pattern):
    with pytest.raises(RecipeError, match="0 < N < M"):
        parse_pattern(pattern)
    with pytest.raises(ValidationError, match="0 < N < M"):
        SparsityOptions(pattern=pattern)


def test_pattern_without_quotes_in_yaml_is_explained():
    with pytest.raises(ValidationError, match='in quotes, "2:4"'):
        SparsityOptions(pattern=2 * 60 + 4)


def test_exactly_one_of_sparsity_and_pattern():
    for keys in ({}, {"sparsity": 0.5, "pattern": "2:4"}):
        with pytest.raises(ValidationError, match="either `sparsity`"):
            MagnitudeOptions(**keys)
    for value in (0, 1, -0.1, 1.5):
        with pytest.raises(ValidationError):
            SparsityOptions(sparsity=value)


def test_scheme_counts_what_is_removed():
    assert SparsityOptions(pattern="1:4").scheme(Scheme(), torch.float16) == Scheme(None, 0.25, (1, 4))
    assert SparsityOptions(sparsity=0.3).scheme(Scheme(sparsity=0.5), torch.float16).sparsity == 0.5


def test_shortgpt():
    influence = torch.tensor([0.30, 0.05, 0.20, 0.05])
    assert shortgpt(influence, 2) == [1, 3]
    assert shortgpt(influence, 1) == [1], "of equals the first"
    assert shortgpt(influence, 3) == [1, 2, 3]
    for drop in (4, 5):
        with pytest.raises(RecipeError, match="drop at most 3"):
            shortgpt(influence, drop)
