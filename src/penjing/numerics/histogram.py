"""How the inputs of a linear are distributed, without keeping them."""

from __future__ import annotations

import math

import torch
from torch import Tensor

BINS = 8192
"""Of a histogram; at least half of them lie between minus and plus the largest magnitude."""

_SMALLEST_REACH = 2.0**-100
_CHUNK = 2**20


class Histogram:
    """Counts of values in bins of equal width from `-reach` to `reach`, for all columns together.

    counts   int64 (bins,)
    reach    the smallest power of two above every magnitude seen; grows by merging pairs of bins, so counts are never
             lost, and the result does not depend on the order in which the values came
    smallest, largest   of the values; NaN once a value was not finite, and nothing is counted from then on
    tokens   vectors of inputs seen
    """

    def __init__(self, columns: int, *, bins: int = BINS) -> None:
        if bins % 4:
            raise ValueError(f"a histogram that can widen needs a multiple of 4 bins, not {bins}")
        self.counts = torch.zeros(bins, dtype=torch.int64)
        self.reach = _SMALLEST_REACH
        self.smallest, self.largest = math.inf, -math.inf
        self.tokens = 0

    def update(self, inputs: Tensor) -> None:
        """Take in a token matrix (T, K)."""
        self.tokens += inputs.shape[0]
        if not inputs.numel():
            return
        smallest, largest = (float(bound) for bound in torch.aminmax(inputs))
        if math.isnan(self.smallest) or not math.isfinite(smallest - largest):
            self.smallest = self.largest = math.nan
            return
        self.smallest, self.largest = min(self.smallest, smallest), max(self.largest, largest)
        self._widen(max(-smallest, largest))
        bins = len(self.counts)
        for values in inputs.flatten().split(_CHUNK):
            position = (values.float() * (bins / 2 / self.reach)).floor_().to(torch.int32) + bins // 2
            self.counts += torch.bincount(position, minlength=bins)

    def _widen(self, magnitude: float) -> None:
        quarter = len(self.counts) // 4
        while self.reach <= magnitude:
            merged = self.counts.view(-1, 2).sum(1)
            self.counts = torch.nn.functional.pad(merged, (quarter, quarter))
            self.reach *= 2

    @property
    def centres(self) -> Tensor:
        """The middle of each bin, fp64 (bins,)."""
        bins = len(self.counts)
        return (torch.arange(bins, dtype=torch.float64) - bins / 2 + 0.5) * (2 * self.reach / bins)

    @property
    def magnitudes(self) -> Tensor:
        """Counts of |x| in bins of the same width from 0 to `reach`, int64 (bins / 2,)."""
        half = len(self.counts) // 2
        return self.counts[half:] + self.counts[:half].flip(0)
