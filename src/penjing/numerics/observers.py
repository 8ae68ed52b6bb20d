"""Which range a static scale covers, chosen from a histogram of the inputs seen during calibration.

    minmax      all of it. One outlier makes the steps of all other values coarse
    percentile  all but a fraction of the values: of |x| when symmetric, half at each end when not
    entropy     the T at which rounding |x| <= T to `high + 1` levels keeps most information: least KL(P || Q), with P
                the histogram up to T, everything beyond added to its last bin, and Q the same without what is beyond,
                its bins merged into levels and each level's count spread evenly over its bins that are not empty
    mse         the range, shrunk in a hundred steps, with the least sum of squared errors of rounding and clipping

Zero is always inside the range. Sources: Migacz 2017, "8-bit inference with TensorRT" (entropy); Wu et al. 2020
(arXiv:2004.09602, section 3.3) compare the first three; mse is that of arXiv:1810.05723 by search.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from penjing.numerics.activations import Activations, InputScale
from penjing.numerics.histogram import Histogram

Observer = Literal["minmax", "percentile", "entropy", "mse"]

SHRINKS = 100
"""Ranges that `mse` tries."""

CUTS = 256
"""Thresholds that `entropy` tries, evenly spaced up to the largest magnitude a histogram can hold."""


def static_scale(seen: Histogram, how: Activations, observer: Observer, percentile: float = 99.99) -> InputScale:
    """Scale fp32 (1,) and zero point int8 (1,), None when symmetric, of finite inputs."""
    if observer == "percentile":
        bounds = percentile_bounds(seen, how.symmetric, percentile)
    elif observer == "entropy":
        bounds = entropy_bounds(seen, how.high + 1)
    elif observer == "mse":
        bounds = mse_bounds(seen, how)
    else:
        bounds = seen.smallest, seen.largest
    scale, zero = how.fit(*(torch.tensor([bound]) for bound in bounds))
    return InputScale(scale, None if zero is None else zero.to(torch.int8))


def percentile_bounds(seen: Histogram, symmetric: bool, percentile: float) -> tuple[float, float]:
    """Bounds between which `percentile` percent of the values lie, up to the width of a bin."""
    beyond = (1 - percentile / 100) * int(seen.counts.sum())
    width = 2 * seen.reach / len(seen.counts)
    if symmetric:
        return _clip(seen, width * _first_above(seen.magnitudes, beyond))
    top = -seen.reach + width * _first_above(seen.counts, beyond / 2)
    bottom = seen.reach - width * _first_above(seen.counts.flip(0), beyond / 2)
    return max(bottom, seen.smallest), min(top, seen.largest)


def _first_above(counts: Tensor, beyond: float) -> int:
    """The first edge that has at most `beyond` values above it."""
    return int((counts.flip(0).cumsum(0).flip(0) > beyond).sum())


def _clip(seen: Histogram, magnitude: float) -> tuple[float, float]:
    return max(seen.smallest, -magnitude), min(seen.largest, magnitude)


def entropy_bounds(seen: Histogram, levels: int) -> tuple[float, float]:
    """The bounds of |x| <= T for which rounding to `levels` magnitudes loses least information."""
    counts = seen.magnitudes.double()
    step = max(1, len(counts) // CUTS)
    cuts = range(max(levels, step), len(counts) + 1, step)
    divergences = [_divergence(counts, cut, levels) for cut in cuts]
    best = min(range(len(cuts)), key=divergences.__getitem__)
    if math.isinf(divergences[best]):
        return seen.smallest, seen.largest
    return _clip(seen, cuts[best] * 2 * seen.reach / len(seen.counts))


def _divergence(counts: Tensor, cut: int, levels: int) -> float:
    """KL(P || Q) of clipping after `cut` bins and rounding to `levels`; infinite where Q says impossible."""
    inside = counts[:cut]
    wanted = inside.clone()
    wanted[-1] += counts[cut:].sum()
    level = torch.arange(cut) * levels // cut
    filled = (inside > 0).double()
    sums, bins = (torch.zeros(levels, dtype=torch.float64).index_add_(0, level, each) for each in (inside, filled))
    rounded = (sums / bins.clamp(min=1))[level] * filled
    if not float(inside.sum()) or bool((rounded[wanted > 0] == 0).any()):
        return math.inf
    wanted, rounded = wanted / wanted.sum(), rounded / rounded.sum()
    there = wanted > 0
    return float((wanted[there] * (wanted[there] / rounded[there]).log()).sum())


def mse_bounds(seen: Histogram, how: Activations) -> tuple[float, float]:
    """The shrunken bounds with the least squared error, each bin taken for its centre."""
    centres, counts = seen.centres, seen.counts.double()
    best, least = (seen.smallest, seen.largest), math.inf
    for shrink in range(SHRINKS, 0, -1):
        bounds = seen.smallest * shrink / SHRINKS, seen.largest * shrink / SHRINKS
        by = how.fit(*(torch.tensor([bound], dtype=torch.float64) for bound in bounds))
        codes = how.encode(centres, by)
        values = (codes if by.zero is None else codes - by.zero) * by.scale
        error = float((counts * (values - centres).square()).sum())
        if error < least:
            best, least = bounds, error
    return best
