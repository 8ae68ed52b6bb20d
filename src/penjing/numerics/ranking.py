"""The smallest of so many scores that they never lie in memory together, by exact counts.

Non-negative floats have the order of their bits read as integers. Two histograms of 16 bits each, in two passes over
the scores, find the value at which the count is reached; of those equal to it, the first go first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Scores = Mapping[str, Tensor]
"""Name -> fp32 scores of any shape, none of them negative but GONE."""

GONE = -1.0
"""The score of what went earlier: it counts as dropped, before all others."""

_BINS = 1 << 16


@dataclass(frozen=True)
class Threshold:
    """All scores whose key is below `key` go, and the first `ties` of those that have it."""

    key: int
    ties: int


def threshold(parts: Callable[[], Iterable[Scores]], drop: int) -> Threshold:
    """Where to cut so that the `drop` smallest scores go. `parts` is called twice and must give the same.

    Raises ValueError when there are not more than `drop` scores.
    """
    high, below = _crossing(parts, lambda keys: keys >> 16, drop)
    low, under = _crossing(parts, lambda keys: keys[keys >> 16 == high] & (_BINS - 1), drop - below)
    return Threshold((high << 16) + low, drop - below - under)


def masks(parts: Iterable[Scores], cut: Threshold) -> Iterator[dict[str, Tensor]]:
    """What stays of each part, bool tensors shaped like the scores; `parts` in the order of before."""
    ties = cut.ties
    for part in parts:
        kept = {}
        for name, scores in part.items():
            keys = _keys(scores)
            equal = keys == cut.key
            gone = (keys < cut.key) | (equal & (equal.cumsum(0) <= ties))
            ties -= min(ties, int(equal.sum()))
            kept[name] = (~gone & (keys > 0)).view(scores.shape)
        yield kept


def _crossing(parts: Callable[[], Iterable[Scores]], digits: Callable[[Tensor], Tensor], drop: int) -> tuple[int, int]:
    """The bin of a histogram in which score number `drop` + 1 lies, and how many lie in the bins before it."""
    counts = torch.zeros(_BINS, dtype=torch.int64)
    for part in parts():
        for scores in part.values():
            counts += torch.bincount(digits(_keys(scores)), minlength=_BINS)
    total = counts.cumsum(0)
    if int(total[-1]) <= drop:
        raise ValueError(f"{drop} of {int(total[-1])} scores cannot be dropped: one at least must stay")
    found = int(torch.searchsorted(total, drop, right=True))
    return found, int(total[found] - counts[found])


def _keys(scores: Tensor) -> Tensor:
    """int64, flat: the order of the scores; 0 for what is GONE."""
    flat = scores.flatten()
    bits = (flat + 0.0).view(torch.int32).long() + 1  # + 0.0: minus zero is zero
    return bits.masked_fill_(flat == GONE, 0)
