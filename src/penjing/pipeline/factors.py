"""Applying a linear-level step to a weight that an earlier step made a product of two factors.

Each factor is a matrix with inputs of its own: the right one sees the inputs x of the linear, the left one sees what
the right one makes of them, `R x`, once R is what will be stored. With G the Gram matrix of x, that of `R x` is `R G
R^T`, so a method that works with Gram matrices compresses both without another pass over the text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from penjing.methods.base import LinearInput
from penjing.representations import Coded, Dense, LowRank, Representation
from penjing.statistics import Gram, Statistics


def apply(
    method: Callable[[LinearInput], Representation], given: LinearInput, before: Representation | None
) -> Representation:
    """What `method` makes of a weight; of its factors, one after the other, when `before` is a product.

    given   the weight with its statistics; for a product, the values it stands for
    before  what earlier steps made of it
    """
    if not isinstance(before, LowRank):
        return method(given)
    right = method(replace(given, weight=before.right.dense().float(), kept=None, parts=()))
    between = _after(right, given.statistics)
    left = method(replace(given, weight=before.left.dense().float(), statistics=between, kept=None, parts=()))
    return LowRank(_factor(left), _factor(right))


def _after(right: Representation, statistics: Statistics) -> Statistics:
    """Statistics of the outputs of a factor (r, K) whose inputs have these."""
    if Gram not in statistics:
        return {}
    seen, weight = statistics[Gram], right.dense().float()
    return {Gram: Gram.known(weight @ seen.value @ weight.T, seen.tokens)}


def _factor(result: Representation) -> Dense | Coded:
    if isinstance(result, Dense | Coded):
        return result
    raise TypeError(f"a factor cannot be {type(result).__name__}")
