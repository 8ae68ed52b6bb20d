"""NaN and infinite values are found wherever they are, in every dtype that has them."""

from __future__ import annotations

import pytest
import torch

from penjing.numerics.finite import all_finite


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [(0, 0), (2, 3), (4, 6)])
def test_one_bad_value_is_found(dtype: torch.dtype, value: float, place: tuple[int, int]) -> None:
    tensor = torch.arange(35.0).view(5, 7).sub(17)
    assert all_finite(tensor.to(dtype))
    tensor[place] = value
    assert not all_finite(tensor.to(dtype))
    assert not all_finite(tensor.to(dtype).T)


def test_integers_and_nothing_are_finite() -> None:
    assert all_finite(torch.tensor([1, 2]))
    assert all_finite(torch.tensor([True]))
    assert all_finite(torch.empty(0, 4))
