"""Rounding inside training: values by hand, gradients against the rule and finite differences, exact export."""

import pytest
import torch

from penjing.numerics.fake_quantisation import (
    first_reach,
    highest,
    largest,
    learnt,
    rounded,
    rounded_to_range,
    snapped,
    step_of,
    stored,
)
from penjing.numerics.grids import IntegerGrid


def values(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_worked_example():
    x = torch.tensor([0.5, -1.5, 0.7])
    assert rounded_to_range(x, 3, torch.float32).tolist() == [0.5, -1.5, 0.5]
    assert rounded_to_range(torch.zeros(4), 4, torch.bfloat16).tolist() == [0.0] * 4


def test_gradients_pass_inside_and_stop_outside():
    x = torch.tensor([0.4, 2.0, -3.0], requires_grad=True)
    rounded(x, torch.tensor(0.5), 3).sum().backward()
    assert x.grad.tolist() == [1.0, 0.0, 0.0]
    x = torch.tensor([0.4, 2.0, -3.0], requires_grad=True)
    rounded_to_range(x, 3, torch.bfloat16).sum().backward()
    assert x.grad.tolist() == [1.0, 1.0, 1.0], "min-max cuts nothing off"


def test_the_step_learns_as_lsq_says():
    x, bits = values(6, 8).double(), 4
    reach = (0.6 * largest(x)).requires_grad_()
    gradient = values(6, 8, seed=1).double()
    learnt(x, reach, bits, torch.float64).backward(gradient)
    top = highest(bits)
    ratio = x / (reach.detach() / top)
    of_step = torch.where(ratio.abs() < top, ratio.round() - ratio, ratio.sign() * top)
    wanted = (gradient * of_step).sum(-1, keepdim=True) / top / (x.shape[-1] * top) ** 0.5
    assert torch.allclose(reach.grad, wanted)


def test_a_range_beyond_the_values_is_cut_back():
    x = values(3, 8)
    reach = (2 * largest(x)).requires_grad_()
    assert torch.equal(learnt(x, reach, 4, torch.bfloat16), rounded_to_range(x, 4, torch.bfloat16))
    assert (first_reach(x, 4) <= largest(x)).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("share", [1.0, 0.55])
def test_a_fit_to_stored_values_finds_the_same_grid(dtype, bits, share):
    x = values(64, 32)
    x[3], x[4, 1:], x[5] = 0, 0, 1e-30
    reach = stored(share * largest(x), dtype)
    wanted = rounded(x, step_of(reach, bits, dtype), bits)
    file = snapped(x, reach, bits, dtype).to(dtype)
    grid = IntegerGrid(bits, None, True, "narrow", dtype)
    scale, zero = grid.fit_rows(file.float())
    decoded = grid.decode(grid.encode(file.float(), scale, zero), scale, zero)
    assert torch.equal(decoded, wanted)
