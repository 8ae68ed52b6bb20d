"""Strips cover every row once, whatever the shape, and working in them changes no number."""

import pytest
import torch

from penjing.methods.quantization.rtn import rtn
from penjing.numerics import strips
from penjing.numerics.grids import IntegerGrid


@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (7, 3), (5, 0), (3, 10_000_000), (4096, 4096), (49_152, 576)])
def test_rows_are_covered_once_and_no_strip_is_too_large(shape):
    rows, columns = shape
    pieces, most = list(strips.strips(torch.empty(shape, device="meta"))), strips.ELEMENTS["cuda"]
    assert [row for piece in pieces for row in range(rows)[piece]] == list(range(rows))
    assert all(len(range(rows)[piece]) * columns <= most or len(range(rows)[piece]) == 1 for piece in pieces)


@pytest.mark.parametrize("size", [16, 5, None, "tensor"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_rounding_by_strips_is_rounding(monkeypatch, size, symmetric):
    weight = torch.randn(37, 48, generator=torch.Generator().manual_seed(0))
    grid = IntegerGrid(4, size, symmetric)
    whole = rtn(weight, grid)
    expected = whole.dense()
    monkeypatch.setitem(strips.ELEMENTS, "cpu", 200)  # four rows
    pieces = rtn(weight, grid)
    assert torch.equal(pieces.codes, whole.codes)
    assert torch.equal(pieces.dense(), expected)
