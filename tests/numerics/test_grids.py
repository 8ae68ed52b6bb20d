"""Integer grids against a number-by-number reference, and their promises on ugly groups."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import naive
from penjing.numerics.grids import IntegerGrid

RULES = ["full", "narrow", "wide", "signed-max"]
GRIDS = [IntegerGrid(4, 8, True, rule, torch.float32) for rule in RULES] + [
    IntegerGrid(4, 8, False, "full", torch.float32)
]


def rounded(weight, grid):
    scale, zero = grid.fit_rows(weight)
    columns = weight.shape[1]
    scale, zero = grid.spread(scale, columns), grid.spread(zero, columns)
    return grid.decode(grid.encode(weight, scale, zero), scale, zero)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [8, 5, None, "tensor", 100])
def test_symmetric_equals_reference(rule, bits, size):
    grid = IntegerGrid(bits, size, True, rule, torch.float32)
    weight = naive.random_weight(3, 20)
    naive.assert_same_rounding(rounded(weight, grid), naive.rtn(weight, grid), weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("size", [8, 5, None, "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_asymmetric_equals_reference(bits, size, dtype):
    grid = IntegerGrid(bits, size, False, "full", dtype)
    weight = naive.random_weight(3, 20)
    naive.assert_same_rounding(rounded(weight, grid), naive.rtn(weight, grid), weight)


def test_hand_solved_scales():
    weight = torch.tensor([[1.0, -3.0, 2.0]])
    expected = {"full": 3 / 3.5, "narrow": 1.0, "wide": 0.75, "signed-max": 0.75}
    for rule, scale in expected.items():
        grid = IntegerGrid(3, None, True, rule, torch.float32)
        assert grid.fit(weight)[0].item() == pytest.approx(scale)
    negative = IntegerGrid(3, None, True, "signed-max", torch.float32).fit(-weight)[0].item()
    assert negative == pytest.approx(-0.75), "the largest weight is positive, so the scale is negative"


def test_hand_solved_zero_point():
    grid = IntegerGrid(2, None, False, "full", torch.float32)
    scale, zero = grid.fit(torch.tensor([[-1.0, 2.0]]))
    assert (scale.item(), zero.item()) == (1.0, -1.0)
    scale, zero = grid.fit(torch.tensor([[3.0, 6.0]]))  # zero belongs to the range although no weight is near it
    assert (scale.item(), zero.item()) == (2.0, -2.0)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.scale_rule if grid.symmetric else "asymmetric")
def test_error_is_at_most_half_a_step_inside_the_range(grid):
    weight = naive.random_weight(16, 64)
    scale, _ = grid.fit_rows(weight)
    step = grid.spread(scale.abs(), 64)
    worst = (rounded(weight, grid) - weight).abs() / step
    allowed = 1.0 if grid.scale_rule in ("wide", "signed-max") else 0.5  # +m or -m clips by up to a step
    assert worst.max() <= allowed + 1e-4


def test_signed_max_keeps_the_largest_weight_exactly():
    grid = IntegerGrid(4, 16, True, "signed-max", torch.float32)
    weight = naive.random_weight(8, 64)
    position = weight.view(-1, 16).abs().argmax(1, keepdim=True)
    largest = weight.view(-1, 16).gather(1, position)
    torch.testing.assert_close(rounded(weight, grid).view(-1, 16).gather(1, position), largest)


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: grid.scale_rule if grid.symmetric else "asymmetric")
def test_zeros_stay_zeros(grid):
    weight = naive.random_weight(4, 32)
    weight[:, ::3] = 0
    weight[1] = 0
    result = rounded(weight, grid)
    assert (result[:, ::3] == 0).all() and (result[1] == 0).all() and torch.isfinite(result).all()


def test_constant_group_is_kept_by_an_asymmetric_grid():
    for value in (0.3, -0.3):
        weight = torch.full((2, 8), value)
        torch.testing.assert_close(rounded(weight, IntegerGrid(3, 8, False, "full", torch.float32)), weight)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("magnitude", [1e-30, 1e-8, 1.0, 1e4])
@pytest.mark.parametrize("symmetric", [True, False])
def test_extreme_magnitudes_stay_finite_and_scales_storable(dtype, magnitude, symmetric):
    grid = IntegerGrid(4, 8, symmetric, "full", dtype)
    weight = naive.random_weight(4, 16) * magnitude
    scale, _ = grid.fit_rows(weight)
    assert torch.equal(scale, scale.to(dtype).float()) and (scale != 0).all()
    assert torch.isfinite(rounded(weight, grid)).all()


@given(st.integers(1, 70), st.integers(2, 40), st.integers(2, 8), st.booleans(), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_codes_are_in_range_and_rounding_is_idempotent(columns, size, bits, symmetric, seed):
    grid = IntegerGrid(bits, size, symmetric, "full", torch.float32)
    weight = naive.random_weight(2, columns, seed=seed)
    scale, zero = grid.fit_rows(weight)
    assert scale.shape == zero.shape == (2, grid.groups(columns))
    scale, zero = grid.spread(scale, columns), grid.spread(zero, columns)
    codes = grid.encode(weight, scale, zero)
    assert codes.min() >= grid.low and codes.max() <= grid.high and torch.equal(codes, codes.round())
    assert torch.equal(grid.encode(grid.decode(codes, scale, zero), scale, zero), codes)


def test_scaling_the_weights_scales_the_result():
    for grid in GRIDS:
        weight = naive.random_weight(4, 32)
        torch.testing.assert_close(rounded(weight * 8, grid), rounded(weight, grid) * 8, rtol=0, atol=0)


@pytest.mark.parametrize(("bits", "expected"), [(2, 0.252), (3, 0.0462), (4, 0.0101)])
def test_gaussian_distortion_is_the_known_one(bits, expected):
    """Mean squared error of asymmetric min-max rounding of N(0, 1) in groups of 128."""
    weight = torch.randn(512, 1024, generator=torch.Generator().manual_seed(0))
    grid = IntegerGrid(bits, 128, False, "full", torch.float32)
    assert (rounded(weight, grid) - weight).square().mean().item() == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [8, 5, None, "tensor"])
def test_float_zero_points_are_added_before_rounding(size, dtype):
    grid = IntegerGrid(3, size, False, "full", dtype, "float")
    weight = naive.random_weight(4, 20)
    scale, zero = grid.fit_rows(weight)
    assert torch.equal(zero, zero.to(dtype).float()) and (zero != zero.round()).any()
    scale, zero = grid.spread(scale, 20), grid.spread(zero, 20)
    codes = grid.encode(weight, scale, zero)
    for row in range(4):
        for column in range(20):
            exact = weight[row, column].item() / scale[row, column].item() + zero[row, column].item()
            assert abs(codes[row, column].item() - min(max(exact, -4), 3)) <= 0.5 + 1e-4
    assert codes.min() >= -4 and codes.max() <= 3
    assert ((grid.decode(codes, scale, zero) - weight).abs() <= scale * 0.55).all()


def test_float_zero_points_hold_both_ends_of_the_range():
    weight = torch.tensor([[-0.31, 0.05, 0.7]])
    decoded = rounded(weight, IntegerGrid(2, None, False, "full", torch.float32, "float"))
    assert decoded[0, 0].item() == pytest.approx(-0.31) and decoded[0, 2].item() == pytest.approx(0.7)
    whole = rounded(weight, IntegerGrid(2, None, False, "full", torch.float32))
    assert whole[0, 0].item() != pytest.approx(-0.31)
