"""Pieces of work side by side: results in order whatever runs first, warnings with the piece that gave them."""

import warnings

import torch

from penjing.pipeline.parallel import side_by_side


def test_results_keep_their_order_and_the_longest_begins_first(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    begun = []

    def square(number):
        begun.append(number)
        if number == 3:
            warnings.warn("odd", stacklevel=1)
        return number**2

    assert side_by_side(square, [1, 3, 2], cost=float) == [(1, []), (9, ["odd"]), (4, [])]
    assert begun == [3, 2, 1]
    assert side_by_side(square, []) == []
