"""The blocked column sweep against elimination without blocks."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import naive
from penjing.numerics.cholesky import inverse_factor
from penjing.numerics.sweep import block_bounds, sweep


@given(st.integers(1, 300), st.integers(1, 140), st.integers(1, 200))
@settings(max_examples=80, deadline=None)
def test_blocks_cover_the_columns_and_no_segment_straddles_a_cut(columns, block, width):
    starts = list(range(0, columns, width))
    bounds = block_bounds(columns, block, starts)
    assert bounds[0] == 0 and bounds[-1] == columns
    assert all(0 < stop - start <= block for start, stop in pairwise(bounds))
    for first in starts:
        if first not in bounds:  # it must end inside the block it starts in
            _, stop = next(pair for pair in pairwise(bounds) if pair[0] < first < pair[1])
            assert min(first + width, columns) <= stop


@pytest.mark.parametrize("block", [1, 3, 8, 50])
def test_equals_elimination_and_accounts_for_the_loss(block):
    inputs = naive.correlated(200, 24).double()
    weight = naive.random_weight(6, 24).double()
    gram = inputs.T @ inputs
    factor, _ = inverse_factor(gram, 0.01)
    hessian = naive.damped(gram, 0.01)

    def coarse(values):
        return (values * 20).round() / 20

    expected, total = naive.eliminate(weight, hessian, lambda column, current, inverse: coarse(current[:, column]))
    columns = weight.T.contiguous()
    sweep(columns, factor, block_bounds(24, block), lambda position, column: coarse(column))
    torch.testing.assert_close(columns.T, expected)
    assert naive.loss(weight, columns.T, hessian) == pytest.approx(total, rel=1e-9)


def test_block_and_segment_are_current_when_reached():
    """At the first column of a segment all of it holds what elimination without blocks would have."""
    inputs = naive.correlated(100, 20).double()
    weight = naive.random_weight(3, 20).double()
    gram = inputs.T @ inputs
    factor, _ = inverse_factor(gram, 0.01)
    seen, expected = {}, {}

    def fix(column, current, inverse):
        if column % 6 == 0:
            expected[column] = current[:, column : column + 6].clone()
        return current[:, column].round(decimals=1)

    naive.eliminate(weight, naive.damped(gram, 0.01), fix)
    columns = weight.T.contiguous()

    def replace(position, column):
        if position % 6 == 0:
            seen[position] = columns[position : position + 6].T.clone()
        return column.round(decimals=1)

    for block in (4, 6, 8, 13, 20):
        columns = weight.T.contiguous()
        sweep(columns, factor, block_bounds(20, block, range(0, 20, 6)), replace)
        assert seen.keys() == expected.keys()
        for first, values in expected.items():
            torch.testing.assert_close(seen[first], values)
