"""Exact counts, stable ties, N:M patterns."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penjing.numerics.masks import dropped_of, keep_largest, keep_pattern


def test_counts_are_not_fooled_by_binary_fractions():
    assert [dropped_of(100, 0.29), dropped_of(10, 0.7), dropped_of(7, 0.5), dropped_of(10, 0.0)] == [29, 7, 3, 0]


@given(st.integers(1, 6), st.integers(1, 30), st.data())
@settings(max_examples=40, deadline=None)
def test_exactly_the_smallest_go_even_with_ties(rows, columns, data):
    drop = data.draw(st.integers(0, columns))
    values = data.draw(st.lists(st.integers(0, 3), min_size=rows * columns, max_size=rows * columns))
    scores = torch.tensor(values, dtype=torch.float32).view(rows, columns)
    kept = keep_largest(scores, drop)
    assert ((~kept).sum(1) == drop).all()
    for row in range(rows):
        expected = sorted(range(columns), key=lambda column, row=row: (scores[row, column].item(), column))[:drop]
        assert (~kept[row]).nonzero().flatten().tolist() == sorted(expected)


def test_what_is_gone_counts_and_stays_gone():
    scores = torch.tensor([[5.0, 1.0, 2.0, 9.0]])
    gone = torch.tensor([[True, True, True, False]])
    assert keep_largest(scores, 2, gone).tolist() == [[True, False, True, False]]
    assert keep_largest(scores, 0, gone).tolist() == gone.tolist()


@pytest.mark.parametrize(("zeros", "of"), [(2, 4), (4, 8), (1, 4), (3, 4), (1, 2)])
def test_pattern_keeps_the_largest_sum(zeros, of):
    scores = torch.rand(5, 4 * of, generator=torch.Generator().manual_seed(0))
    kept = keep_pattern(scores, zeros, of)
    groups, chosen = scores.view(-1, of), kept.view(-1, of)
    assert (chosen.sum(1) == of - zeros).all()
    best = groups.topk(of - zeros).values.sum(1)
    torch.testing.assert_close((groups * chosen).sum(1), best)
