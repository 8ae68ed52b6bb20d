"""Grids with quantised statistics: number by number, ragged sizes, groups that have no range."""

import pytest
import torch

import naive
from penjing.numerics.bilevel import BilevelGrid, savings


def test_worked_example():
    grid = BilevelGrid(bits=2)
    weight = torch.tensor([-0.2, 0.1, 0.4])
    scale, zero = grid.fit(weight.min(), weight.max())
    assert float(scale) == pytest.approx(0.2) and float(zero) == pytest.approx(1)
    assert grid.encode(weight, scale, zero).tolist() == [0, 2, 3]
    torch.testing.assert_close(grid.decode(torch.tensor([0.0, 2.0, 3.0]), scale, zero), torch.tensor([-0.2, 0.2, 0.4]))


@pytest.mark.parametrize(("rows", "size", "bits"), [(32, 16, 3), (21, 16, 3), (5, 16, 2), (9, 4, 4), (1, 16, 3)])
def test_statistics_number_by_number(rows, size, bits):
    grid = BilevelGrid(statistic_bits=bits, statistic_group=size, scale_dtype=torch.bfloat16)
    values = naive.random_weight(2, rows).abs() + 0.01
    coded = grid.code_statistics(values)
    assert coded.codes.dtype == torch.uint8 and coded.step.dtype == torch.bfloat16
    for kind in range(2):
        for first in range(0, rows, size):
            members = values[kind, first : first + size].double().tolist()
            bottom = float(torch.tensor(min(members)).bfloat16())
            step = float(torch.tensor(max(max(members) - bottom, 0) / (2**bits - 1)).bfloat16())
            for row, value in enumerate(members, first):
                code = min(max(round((value - bottom) / (step or 1)), 0), 2**bits - 1)
                assert int(coded.codes[kind, row]) == code
                assert float(coded.values()[kind, row]) == pytest.approx(bottom + step * code, rel=1e-6)


@pytest.mark.parametrize("value", [0.0, 0.7, -3.0, 1e-30])
def test_groups_without_a_range(value):
    grid = BilevelGrid(scale_dtype=torch.float32)
    end = torch.tensor([value])
    scale, zero = grid.fit(end, end)
    assert torch.isfinite(scale).all() and torch.isfinite(zero).all()
    decoded = grid.decode(grid.encode(end, scale, zero), scale, zero)
    torch.testing.assert_close(decoded, end, rtol=1e-5, atol=1e-29)


def test_a_group_far_from_zero_keeps_its_zero_small():
    """Otherwise one row would take the whole range of the zeros that it shares a second level with."""
    grid = BilevelGrid()
    for low, high in ((0.7, 0.7001), (-5.0, -4.999)):
        _, zero = grid.fit(torch.tensor(low), torch.tensor(high))
        assert -grid.high <= float(zero) <= 2 * grid.high


def leave_one_out(members, harm, grid):
    """The plain way: refit without each weight in turn, fp64."""

    def damage(rest, weights):
        low, high = min(rest), max(rest)
        low, high = min(low, high / 2), max(high, low / 2)
        scale = (high - low) / grid.high
        zero = -low / scale if scale else 0
        total = 0.0
        for value, weight in zip(rest, weights, strict=True):
            code = min(max(round(value / scale + zero), 0), grid.high) if scale else 0
            total += (value - scale * (code - zero)) ** 2 * weight
        return total

    everything = damage(members, harm)
    pairs = list(zip(members, harm, strict=True))
    return [everything - damage(*zip(*(pairs[:i] + pairs[i + 1 :]), strict=True)) for i in range(len(pairs))]


def test_savings_example():
    saved = savings(torch.tensor([[0.0], [1.0], [3.0], [10.0]]), torch.ones(4, 1), BilevelGrid(bits=2))
    torch.testing.assert_close(saved.flatten(), torch.tensor([1 / 9, 1.0, 1 / 9, 10 / 9]))


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("members", [2, 3, 16])
def test_savings_equal_refitting_without_each(bits, members):
    grid, weight = BilevelGrid(bits=bits), naive.random_weight(members, 20, seed=bits)
    harm = torch.rand(members, 1, generator=torch.Generator().manual_seed(2)) + 0.1
    found = savings(weight, harm, grid)
    for row in range(20):
        expected = leave_one_out(weight[:, row].double().tolist(), harm.flatten().double().tolist(), grid)
        torch.testing.assert_close(found[:, row].double(), torch.tensor(expected).double(), rtol=1e-3, atol=1e-7)


def test_a_single_member_saves_nothing():
    assert savings(torch.ones(1, 3), torch.ones(1, 1), BilevelGrid()).tolist() == [[0, 0, 0]]
