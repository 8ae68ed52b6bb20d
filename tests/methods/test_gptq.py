"""GPTQ against elimination in fp64, identities, orders, masks and thin statistics."""

import warnings

import pytest
import torch

import naive
from penjing.methods.quantization.gptq import GPTQOptions, gptq, visiting_order
from penjing.methods.quantization.rtn import rtn
from penjing.numerics.cholesky import DampingWarning
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Masked, Scheme

ROWS, COLUMNS = 12, 48


def problem(seed=0, rows=ROWS, columns=COLUMNS, tokens=256):
    inputs = naive.correlated(tokens, columns, seed=seed)
    return naive.random_weight(rows, columns, seed=seed + 100), inputs.T @ inputs


def grid_of(bits=3, size=16, symmetric=True, rule="narrow"):
    return IntegerGrid(bits, size, symmetric, rule, torch.float32)


def assert_mostly_equal(result, expected, hessian, weight):
    """Same values but for rows in which fp32 resolved a near-tie the other way; then the same loss."""
    different = (result.double() - expected).abs() > 1e-4
    assert different.double().mean() < 0.01, f"{different.double().mean():.2%} of the entries differ"
    assert naive.loss(weight, result, hessian) == pytest.approx(naive.loss(weight, expected, hessian), rel=0.02)


def test_worked_example():
    grid = IntegerGrid(8, None, True, "narrow", torch.float32)

    class Whole(IntegerGrid):
        def fit(self, weight):
            return torch.ones(weight.shape[:-1]), torch.zeros(weight.shape[:-1])

    whole = Whole(**vars(grid))
    weight, gram = torch.tensor([[0.6, 0.8]]), torch.tensor([[2.0, 1.0], [1.0, 1.0]])
    assert gptq(weight, gram, whole, damping=0, order="natural").dense().tolist() == [[1.0, 0.0]]
    assert rtn(weight, whole).dense().tolist() == [[1.0, 1.0]]
    assert naive.loss(weight, torch.tensor([[1.0, 0.0]]), gram) == pytest.approx(0.32)
    assert naive.loss(weight, torch.tensor([[1.0, 1.0]]), gram) == pytest.approx(0.52)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("bits", "size"), [(2, 16), (3, 16), (4, 8), (4, 20), (4, None), (8, 48)])
@pytest.mark.parametrize("static", [True, False])
def test_natural_order_equals_reference(bits, size, symmetric, static):
    weight, gram = problem()
    grid = grid_of(bits, size, symmetric)
    hessian = naive.damped(gram, 0.01)
    expected, total = naive.gptq(weight, hessian, grid, static=static)
    result = gptq(weight, gram, grid, order="natural", static_groups=static, block_size=16)
    assert result.group_index is None
    assert_mostly_equal(result.dense(), expected, hessian, weight)
    assert total == pytest.approx(naive.loss(weight, expected, hessian), rel=1e-6)


@pytest.mark.parametrize("static", [True, False])
def test_activation_order_equals_reference(static):
    weight, gram = problem()
    hessian = naive.damped(gram, 0.01)
    order = gram.diagonal().argsort(descending=True).tolist()
    expected, _ = naive.gptq(weight, hessian, grid_of(), order, static=static)
    result = gptq(weight, gram, grid_of(), order="activation", static_groups=static)
    assert_mostly_equal(result.dense(), expected, hessian, weight)
    if static:
        assert result.group_index is None
    else:
        assert result.group_index.dtype == torch.int32
        assert result.group_index[order].tolist() == [position // 16 for position in range(COLUMNS)]


@pytest.mark.parametrize("size", [16, 20])
def test_group_order_visits_whole_groups_and_needs_no_index(size):
    activity = torch.rand(COLUMNS, generator=torch.Generator().manual_seed(3))
    visited = visiting_order(activity, size, "group-activation").tolist()
    assert sorted(visited) == list(range(COLUMNS))
    groups = [column // size for column in visited]
    runs = [group for position, group in enumerate(groups) if position == 0 or groups[position - 1] != group]
    assert len(runs) == len(set(runs))
    peaks = [max(activity[column].item() for column in visited if column // size == group) for group in runs]
    assert peaks == sorted(peaks, reverse=True)
    weight, gram = problem()
    result = gptq(weight, gram, grid_of(size=size), order="group-activation", static_groups=False)
    assert result.group_index is None


def test_group_order_is_that_of_group_aware_reordering():
    """arXiv:2505.14638 with the largest diagonal entry as a group's importance, ties as they come."""
    activity = torch.rand(64, generator=torch.Generator().manual_seed(4))
    activity[10:13] = activity[40]
    groups = [list(range(first, first + 16)) for first in range(0, 64, 16)]
    inside = [sorted(group, key=lambda column: -activity[column].item()) for group in groups]
    expected = [column for group in sorted(inside, key=lambda group: -activity[group[0]].item()) for column in group]
    assert visiting_order(activity, 16, "group-activation").tolist() == expected


@pytest.mark.parametrize("order", ["natural", "activation", "group-activation"])
def test_codes_and_scales_belong_together(order):
    """Refitted groups: every column lies on the grid of the group it is said to belong to."""
    weight, gram = problem()
    result = gptq(weight, gram, grid_of(size=20), order=order, static_groups=False)
    assert result.codes.shape == weight.shape and result.scale.shape == (ROWS, 3)
    assert naive.loss(weight, result.dense(), gram) < naive.loss(weight, rtn(weight, grid_of(size=20)).dense(), gram)


@pytest.mark.parametrize("size", [16, 20, None, "tensor"])
@pytest.mark.parametrize("order", ["natural", "group-activation"])
@pytest.mark.parametrize("static", [True, False])
def test_uncorrelated_inputs_make_it_round_to_nearest(size, order, static):
    weight = naive.random_weight(ROWS, COLUMNS)
    grid = grid_of(size=size)
    result = gptq(weight, torch.eye(COLUMNS) * 7, grid, order=order, static_groups=static)
    assert torch.equal(result.dense(), rtn(weight, grid).dense())


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("order", ["natural", "activation", "group-activation"])
def test_loses_less_than_rounding_to_nearest(seed, order):
    weight, gram = problem(seed)
    for size in (16, None, "tensor"):
        grid = grid_of(3, size, rule="full")
        found = naive.loss(weight, gptq(weight, gram, grid, order=order).dense(), gram)
        assert found < 0.9 * naive.loss(weight, rtn(weight, grid).dense(), gram)


def test_block_size_changes_nothing():
    weight, gram = problem(columns=50)
    options = {"order": "group-activation", "static_groups": False}
    expected = gptq(weight, gram, grid_of(), block_size=128, **options)
    for block in (1, 7, 16, 33, 50):
        result = gptq(weight, gram, grid_of(), block_size=block, **options)
        assert (result.codes != expected.codes).double().mean() < 0.01
        torch.testing.assert_close(result.scale, expected.scale, rtol=0.01, atol=0)


def test_permuting_the_inputs_permutes_the_result():
    weight, gram = problem()
    shuffle = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(0))
    for size in (None, 16):
        options = {"order": "activation", "static_groups": False}  # groups of consecutive columns cannot follow along
        straight = gptq(weight, gram, grid_of(size=size), **options).dense()
        shuffled = gptq(weight[:, shuffle], gram[shuffle][:, shuffle], grid_of(size=size), **options).dense()
        assert ((shuffled - straight[:, shuffle]).abs() > 1e-4).double().mean() < 0.01


def test_scale_of_the_gram_matrix_does_not_matter():
    weight, gram = problem()
    expected = gptq(weight, gram, grid_of()).dense()
    for factor in (2.0**-40, 2.0**40):
        assert torch.equal(gptq(weight, gram * factor, grid_of()).dense(), expected)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", ["natural", "activation", "group-activation"])
def test_mask_is_kept_and_its_error_compensated(symmetric, order):
    weight, gram = problem()
    kept = weight.abs() > weight.abs().median()
    result = gptq(weight, gram, grid_of(4, symmetric=symmetric), order=order, kept=kept)
    assert isinstance(result, Masked) and (result.values.dense()[~kept] == 0).all()
    plain = rtn(weight, grid_of(4, symmetric=symmetric), kept=kept)
    assert naive.loss(weight, result.dense(), gram) < naive.loss(weight, plain.dense(), gram)


@pytest.mark.parametrize("static", [True, False])
def test_masked_equals_reference(static):
    weight, gram = problem()
    kept = weight.abs() > weight.abs().median()
    hessian = naive.damped(gram, 0.01)
    # The package zeroes what is masked when its column is reached, as the reference does.
    expected, _ = naive.gptq(weight, hessian, grid_of(4), static=static, kept=kept)
    result = gptq(weight, gram, grid_of(4), order="natural", static_groups=static, kept=kept)
    assert_mostly_equal(result.dense(), expected, hessian, weight)


@pytest.mark.parametrize("order", ["natural", "activation", "group-activation"])
@pytest.mark.parametrize("static", [True, False])
def test_dead_columns_become_zero_and_disturb_nothing(order, static):
    inputs = naive.correlated(256, COLUMNS)
    dead = [0, 17, 18]
    inputs[:, dead] = 0
    weight = naive.random_weight(ROWS, COLUMNS)
    result = gptq(weight, inputs.T @ inputs, grid_of(), order=order, static_groups=static).dense()
    assert (result[:, dead] == 0).all() and torch.isfinite(result).all()
    changed = weight.clone()
    changed[:, dead] *= 50
    again = gptq(changed, inputs.T @ inputs, grid_of(), order=order, static_groups=static).dense()
    assert torch.equal(again, result)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_few_tokens_give_finite_results(tokens, damping):
    inputs = naive.correlated(tokens, COLUMNS)
    weight, gram = naive.random_weight(ROWS, COLUMNS), inputs.T @ inputs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DampingWarning)
        result = gptq(weight, gram, grid_of(), damping=damping)
    assert torch.isfinite(result.dense()).all()
    assert naive.loss(weight, result.dense(), gram) < naive.loss(weight, rtn(weight, grid_of()).dense(), gram)


def test_without_tokens_it_rounds_to_nearest_and_says_so():
    weight = naive.random_weight(ROWS, COLUMNS)
    with pytest.warns(DampingWarning, match="no calibration token"):
        result = gptq(weight, torch.zeros(COLUMNS, COLUMNS), grid_of())
    assert torch.equal(result.dense(), rtn(weight, grid_of()).dense())


@pytest.mark.parametrize("weight", [torch.zeros(4, 32), torch.full((4, 32), 0.7), torch.full((4, 32), 1e-41)])
def test_constant_weights(weight):
    _, gram = problem(columns=32)
    for symmetric in (True, False):
        result = gptq(weight, gram, IntegerGrid(4, 8, symmetric)).dense()
        assert torch.isfinite(result).all()
        torch.testing.assert_close(result, weight, rtol=0.3, atol=1e-30)


def test_scheme_says_when_a_group_index_is_stored():
    for order, static, size, expected in [
        ("activation", False, 64, True),
        ("activation", True, 64, False),
        ("activation", False, "channel", False),
        ("group-activation", False, 64, False),
    ]:
        options = GPTQOptions(order=order, static_groups=static, group_size=size)
        assert options.scheme(Scheme(), torch.bfloat16).ordered == expected
        weight, gram = problem(columns=128)
        grid = options.grid(torch.bfloat16)
        result = gptq(weight, gram, grid, order=order, static_groups=static)
        assert (result.group_index is not None) == expected


def test_input_tensors_are_left_alone():
    weight, gram = problem()
    copies = weight.clone(), gram.clone()
    gptq(weight, gram, grid_of())
    assert torch.equal(weight, copies[0]) and torch.equal(gram, copies[1])


def test_removed_weights_stay_zero_where_zero_is_no_point_of_the_grid():
    weight, gram = problem()
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) > 0.1
    grid = IntegerGrid(3, 16, False, scale_dtype=torch.float32, zero="float")
    result = gptq(weight, gram, grid, kept=kept, scale_search="weights").dense()
    assert not result[~kept].any()
    nearest = rtn(weight, grid, kept=kept, metric=torch.ones(COLUMNS)).dense()
    assert naive.loss(weight, result, gram) < 0.8 * naive.loss(weight, nearest, gram)
