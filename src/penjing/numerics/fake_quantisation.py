"""Rounding inside training: values that lie on a grid, gradients as if they did not have to.

    forward   x' = s clamp(round(x / s), -Q, Q)            Q = 2**(bits-1) - 1            (symmetric, no zero point)
    backward  dx'/dx = 1 inside the range, 0 outside       the straight-through estimator (Bengio et al. 2013)

The range t = s Q is the largest magnitude of a group (min-max), or it is learnt (LSQ), with the gradient

    dx'/ds = -x/s + round(x/s)   inside,   -Q or Q   outside,        times 1 / sqrt(n Q) for n values per step

It is t that is rounded to the type of storage here, and s = stored(t / Q) follows, as a fit to a row whose largest
magnitude is t would find it. So a matrix of the values `snapped` gives is rounded to the very same codes and scales by
whoever fits a symmetric `narrow` grid to it, though bf16 cannot hold s times a code exactly.

Worked example, 3 bits (Q = 3), x = (0.5, -1.5, 0.7): t = 1.5, s = 0.5, codes (1, -3, 1), x' = (0.5, -1.5, 0.5).

Sources: Liu et al. 2023, "LLM-QAT" (arXiv:2305.17888), eq. 3; Esser et al. 2020, "LSQ" (arXiv:1902.08153), eq. 1-5.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class _Rounded(torch.autograd.Function):
    """The nearest whole number, with the gradient of the identity."""

    @staticmethod
    def forward(context: object, value: Tensor) -> Tensor:
        return value.round()

    @staticmethod
    def backward(context: object, gradient: Tensor) -> Tensor:
        return gradient


class _Stored(torch.autograd.Function):
    """The next value towards zero that a type of storage holds, with the gradient of the identity."""

    @staticmethod
    def forward(context: object, value: Tensor, dtype: torch.dtype) -> Tensor:
        near = value.to(dtype)
        below = torch.nextafter(near, torch.zeros_like(near))
        return torch.where(near.to(value.dtype).abs() > value.abs(), below, near).to(value.dtype)

    @staticmethod
    def backward(context: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Nearest(torch.autograd.Function):
    """The nearest value that a type of storage holds, with the gradient of the identity."""

    @staticmethod
    def forward(context: object, value: Tensor, dtype: torch.dtype) -> Tensor:
        return value.to(dtype).to(value.dtype)

    @staticmethod
    def backward(context: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def stored(value: Tensor, dtype: torch.dtype) -> Tensor:
    """A range in its own dtype, moved towards zero until `dtype` holds it; the gradient does not see it.

    Not beyond the largest magnitude, so that this has the largest code, even of 8 bits with scales in bf16.
    """
    return value if value.dtype == dtype else _Stored.apply(value, dtype)


def highest(bits: int) -> int:
    """Q, the largest code of a symmetric grid that is the same on both sides."""
    return 2 ** (bits - 1) - 1


def largest(values: Tensor) -> Tensor:
    """max |x| over the last axis, which stays with length 1; no gradient."""
    return values.detach().abs().amax(-1, keepdim=True)


def step_of(reach: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """s for ranges t >= 0 that `dtype` holds; 1 where it would vanish, so that such a group is zero."""
    step = _Nearest.apply(reach / highest(bits), dtype)
    return torch.where(step == 0, torch.ones_like(step), step)


def rounded(values: Tensor, step: Tensor, bits: int) -> Tensor:
    """x' for values (..., n) and steps that broadcast; differentiable in both."""
    top = highest(bits)
    return _Rounded.apply((values / step).clamp(-top, top)) * step


def rounded_to_range(values: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """x' with the range of each group along the last axis: min-max, nothing is cut off but what storing t costs."""
    reach = stored(largest(values), dtype)
    step = step_of(reach, bits, dtype)
    # values beyond a range that was rounded down keep their gradient
    return values + (rounded(values.detach(), step, bits) - values.detach())


def learnt(values: Tensor, reach: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """x' with a learnt range: values (..., n), `reach` (..., 1).

    A range beyond the largest magnitude would leave codes unused; it is cut back to that, and its gradient with it.
    """
    count = values.shape[-1] * highest(bits)
    slow = reach * count**-0.5
    reach = slow + (reach - slow).detach()
    reach = stored(torch.minimum(reach.clamp(min=0), largest(values)), dtype)
    return rounded(values, step_of(reach, bits, dtype), bits)


def first_reach(values: Tensor, bits: int) -> Tensor:
    """Where a learnt range begins: s = 2 mean|x| / sqrt(Q), as in LSQ, but not beyond the largest magnitude."""
    step = 2 * values.detach().abs().mean(-1, keepdim=True) / math.sqrt(highest(bits))
    return torch.minimum(step * highest(bits), largest(values))


def snapped(values: Tensor, reach: Tensor, bits: int, dtype: torch.dtype) -> Tensor:
    """Values to store for a group whose range is t (`reach`, held by `dtype`): s times the code, and t itself for Q.

    A `narrow` symmetric fit to them, with scales of `dtype`, finds this s and these codes.
    """
    step, top = step_of(reach, bits, dtype), highest(bits)
    codes = (values / step).clamp(-top, top).round()
    return torch.where(codes.abs() == top, codes.sign() * reach, codes * step).to(dtype).to(values.dtype)
