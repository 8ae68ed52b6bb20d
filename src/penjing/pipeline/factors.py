"""Applying a linear-level step to a weight that an earlier step made a product of two factors.

Each factor is a matrix with inputs of its own: the right one sees the inputs x of the linear, the left one sees what
the right one makes of them, `R x`, once R is what will be stored. With G the Gram matrix of x, that of `R x` is `R G
R^T`, so a method that works with Gram matrices compresses both without another pass over the text. Gradients g that
reach the outputs of the linear reach those of the right factor as `L^T g`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import Tensor

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
    both = replace(given, kept=None, parts=())
    reaching = _before(before.left.dense().float(), given.output_grams)
    right = method(replace(both, weight=before.right.dense().float(), output_grams=reaching))
    between = _after(right, given.statistics)
    left = method(replace(both, weight=before.left.dense().float(), statistics=between))
    return LowRank(_factor(left), _factor(right))


def _after(right: Representation, statistics: Statistics) -> Statistics:
    """Statistics of the outputs of a factor (r, K) whose inputs have these."""
    if Gram not in statistics:
        return {}
    seen, weight = statistics[Gram], right.dense().float()
    return {Gram: Gram.known(weight @ seen.value @ weight.T, seen.tokens)}


def _before(left: Tensor, grams: Sequence[Tensor]) -> Sequence[Tensor]:
    """Gram matrix of the gradients that reach the inputs of a factor (N, r) whose outputs they reach with these."""
    if not grams:
        return ()
    total = left.new_zeros(left.shape[1], left.shape[1])
    for part, gram in zip(left.split([len(gram) for gram in grams]), grams, strict=True):
        total.addmm_(part.T @ gram, part)
    return [total]


def _factor(result: Representation) -> Dense | Coded:
    if isinstance(result, Dense | Coded):
        return result
    raise TypeError(f"a factor cannot be {type(result).__name__}")
