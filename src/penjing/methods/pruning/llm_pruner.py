"""LLM-Pruner: units by how much the loss would change without them, from gradients on a few texts.

Taking a weight w away changes the loss by g w - w^2 H / 2 to second order, with g the gradient and H the diagonal of
the Hessian, which the mean of squared gradients E[g_j^2] over texts j stands for:

    first    |g w|             second   |w^2 E[g_j^2]|             mixed   |g w - w^2 E[g_j^2] / 2|

`element` adds that up over all weights of a unit, in all linears that are coupled; `vector` takes the magnitude of the
sum instead of the sum of magnitudes, over each row or column: moving all of it to zero at once.

Worked example: a neuron with weights [1, -1] and gradients [2, 3]: element |2| + |-3| = 5, vector |2 - 3| = 1.

The published code compares query heads of other groups where key-value heads are shared; here a unit is a whole group.
It also leaves the first and last blocks as they are, which gives blocks different widths; config.json has one.

Source: Ma, Fang, Wang 2023, "LLM-Pruner: On the Structural Pruning of Large Language Models" (arXiv:2305.11627),
eq. 3-5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Order = Literal["first", "second", "mixed"]
Granularity = Literal["element", "vector"]


def changes(weight: Tensor, gradient: Tensor, squares: Tensor, order: Order) -> Tensor:
    """Signed change of the loss when each weight goes, up to its sign: fp64, shaped like `weight`.

    gradient  mean over texts; squares  mean over texts of the squared gradient
    """
    w = weight.double()
    if order == "second":
        return w.square() * squares.double()
    change = w * gradient.double()
    return change if order == "first" else change - 0.5 * w.square() * squares.double()


def importance(
    weights: Sequence[Tensor],
    gradients: Sequence[Tensor],
    squares: Sequence[Tensor],
    *,
    order: Order = "first",
    granularity: Granularity = "element",
) -> Tensor:
    """Scores fp64 (U,) from the weights of units: one tensor (U, vectors, length) per coupled linear."""
    total = torch.zeros(len(weights[0]), dtype=torch.float64)
    for weight, gradient, square in zip(weights, gradients, squares, strict=True):
        change = changes(weight, gradient, square, order)
        vectors = change.abs() if granularity == "element" else change.sum(2, keepdim=True).abs()
        total += vectors.flatten(1).sum(1)
    return total
