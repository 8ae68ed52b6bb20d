"""The ternary grid: the exact least-squares scale against brute force, BitNet's rule, packing."""

import itertools

import pytest
import torch

from penjing.numerics.ternary import TernaryGrid, pack_trits, unpack_trits


def coded(weight, grid):
    scale, zero = grid.fit(weight)
    return grid.decode(grid.encode(weight, scale.unsqueeze(-1), zero.unsqueeze(-1)), scale.unsqueeze(-1), 0.0), scale


def test_worked_example():
    weight = torch.tensor([[3.0, -1.0, 0.5, 2.0]])
    values, scale = coded(weight, TernaryGrid(scale_dtype=torch.float32))
    assert scale.item() == 2.5 and values.tolist() == [[2.5, 0, 0, 2.5]]
    values, scale = coded(weight, TernaryGrid(scale_dtype=torch.float32, rule="absmean"))
    assert scale.item() == 1.625 and values.tolist() == [[1.625, -1.625, 0, 1.625]]
    assert float((weight - values).square().sum()) == pytest.approx(2.67, abs=0.01)


def test_no_scale_and_no_codes_are_better():
    weight = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)).double()
    values, _ = coded(weight, TernaryGrid(scale_dtype=torch.float32))
    found = (weight - values).square().sum(1)
    for row, error in zip(weight, found, strict=True):
        best = float(row.square().sum())
        for codes in itertools.product((-1.0, 0.0, 1.0), repeat=6):
            code = torch.tensor(codes).double()
            if code.any():
                scale = (code @ row) / code.square().sum()
                best = min(best, float((row - scale * code).square().sum()))
        assert float(error) == pytest.approx(best, rel=1e-5)


def test_absmean_is_bitnets():
    weight = torch.randn(1, 500, generator=torch.Generator().manual_seed(1))
    gamma = weight.abs().mean()
    values, _ = coded(weight, TernaryGrid(scale_dtype=torch.float32, rule="absmean", group_size="tensor"))
    torch.testing.assert_close(values, (weight / gamma).round().clamp(-1, 1) * gamma)


def test_groups_of_zeros_stay_zero():
    for rule in ("absmean", "least-squares"):
        values, scale = coded(torch.zeros(2, 5), TernaryGrid(rule=rule))
        assert not values.any() and (scale == 1).all()


@pytest.mark.parametrize("count", [0, 1, 4, 5, 6, 243, 1001])
def test_packing(count):
    codes = torch.randint(-1, 2, (count,), generator=torch.Generator().manual_seed(count), dtype=torch.int8)
    packed = pack_trits(codes)
    assert len(packed) == -(-count // 5) == TernaryGrid().code_bytes(count)
    assert torch.equal(unpack_trits(packed, count), codes)


def test_the_first_code_is_the_lowest_digit():
    assert pack_trits(torch.tensor([1, 0, -1, -1, 1], dtype=torch.int8)).tolist() == [2 + 3 + 2 * 81]
