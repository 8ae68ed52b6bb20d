"""OneBit: a matrix of signs between a value per output and a value per input.

    W  ~  sign(W) * (a b^T)        a (N,), b (K,), all positive

Over all a and b, |W - sign(W) * a b^T| = ||W| - a b^T|, so that the best pair is the best rank-1 approximation of the
magnitudes, their first singular vectors. Alternating least squares finds them (power iteration), and finds the weighted
one just as well: with an importance s_j of input j and a mask m of weights that exist,

    a_i = sum_j m_ij s_j b_j |W_ij| / sum_j m_ij s_j b_j^2        b_j = sum_i m_ij a_i |W_ij| / sum_i m_ij a_i^2

The sum of squares never rises. 1 bit per weight and N + K numbers: 1.007 bits for a matrix of 4096 x 4096.

Worked example: W = [[1, -2], [-2, 4]] has magnitudes of rank 1, a = [1, 2], b = [1, 2]: exact. XNOR, with b all ones,
has a = [1.5, 3] and the error 2.5.

The paper trains both vectors and the signs from this start, with a norm after every linear; here the vectors are folded
into the representation and a model without training is what it is. Singular vectors are not unique in length: a has the
mean of the weights' magnitudes, b is about 1.

Source: Xu et al. 2024, "OneBit: Towards Extremely Low-bit Large Language Models" (arXiv:2402.11295), section 3.2.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from pydantic import Field
from torch import Tensor

from penjing.methods.base import LinearInput, Options, StatisticType
from penjing.numerics.binary_coding import BinaryGrid
from penjing.representations import BinaryCoded, Masked, Scheme
from penjing.statistics import ColumnNorm


class OneBitOptions(Options):
    """Recipe keys of OneBit."""

    weighted: bool = Field(True, description="errors count by the mean square of their inputs")
    rounds: int = Field(20, ge=1, description="of alternating least squares")

    def scheme(self, before: Scheme, storage_dtype: torch.dtype) -> Scheme:
        return replace(before, grid=value_grid(storage_dtype))


def value_grid(storage_dtype: torch.dtype) -> BinaryGrid:
    """One sign per weight, a value per output and a value per input."""
    return BinaryGrid(1, None, storage_dtype, inputs_dtype=storage_dtype)


def value_vectors(
    magnitude: Tensor, importance: Tensor | None = None, kept: Tensor | None = None, *, rounds: int = 20
) -> tuple[Tensor, Tensor]:
    """Values of outputs (N,) and inputs (K,) whose products are closest to `magnitude` (N, K), not negative.

    importance  (K,): what a squared error at each input costs; inputs of importance 0 get a value as if all mattered
    kept        bool (N, K): other weights do not count
    """
    counts = torch.ones_like(magnitude) if kept is None else kept.float()
    share = torch.ones(magnitude.shape[1]) if importance is None else importance.float()
    inputs = torch.ones(magnitude.shape[1])
    tiny = torch.finfo(torch.float32).tiny
    magnitude = magnitude * counts
    for _ in range(rounds):
        seen = share * inputs
        outputs = (magnitude @ seen) / (counts @ (seen * inputs)).clamp(min=tiny)
        inputs = (outputs @ magnitude) / (outputs.square() @ counts).clamp(min=tiny)
        size = inputs.mean().clamp(min=tiny)
        inputs, outputs = inputs / size, outputs * size
    return outputs, inputs


def onebit(
    weight: Tensor,
    importance: Tensor | None = None,
    *,
    rounds: int = 20,
    kept: Tensor | None = None,
    storage_dtype: torch.dtype = torch.bfloat16,
) -> BinaryCoded | Masked:
    """Signs and value vectors of `weight` (N, K); weights outside `kept` (bool (N, K)) become exactly zero.

    The values of the outputs are fitted once more to those of the inputs as they are stored.
    """
    magnitude = weight.float().abs()
    _, inputs = value_vectors(magnitude, importance, kept, rounds=rounds)
    stored = inputs.to(storage_dtype)
    counts = stored.float() if importance is None else stored.float() * importance
    mask = torch.ones_like(magnitude) if kept is None else kept.float()
    norms = (mask @ (counts * stored.float())).clamp(min=torch.finfo(torch.float32).tiny)
    alpha = ((magnitude * mask) @ counts / norms).to(storage_dtype).reshape(-1, 1, 1)
    coded = BinaryCoded((weight >= 0).to(torch.uint8), alpha, None, value_grid(storage_dtype), inputs=stored)
    return coded if kept is None else Masked(coded, kept)


def needs(options: OneBitOptions) -> tuple[StatisticType, ...]:
    """Squares of the inputs when they count."""
    return (ColumnNorm,) if options.weighted else ()


def linear(given: LinearInput, options: OneBitOptions) -> BinaryCoded | Masked:
    """Binarise one linear: the value of an input belongs to all outputs of a matrix."""
    importance = given.statistics[ColumnNorm].value if options.weighted else None
    return onebit(given.weight, importance, rounds=options.rounds, kept=given.kept, storage_dtype=given.storage_dtype)
