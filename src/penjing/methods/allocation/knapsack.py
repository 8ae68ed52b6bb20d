"""The multiple-choice knapsack, solved exactly: one option for every unit, least summed loss, within a budget of bytes.

    minimise  sum_u loss[u, x_u]      such that      sum_u size[u, x_u] <= budget

A price `p` per byte turns the constraint into a cost (Lagrange). For every p >= 0

    sum_u min_x (loss[u, x] + p size[u, x])  -  p budget      <=      the least loss within the budget

and what an option has above its unit's minimum, its *reduced cost* (>= 0), adds to that bound. With p the slope where
the lower convex hulls of all units, walked from the cheapest options in order of gain per byte, run out of bytes, the
bound is that of the linear relaxation, and greedy gives a solution close above it. The optimum then lies among the few
options whose reduced cost is below the gap between the two. Dynamic programming over these, unit by unit, keeps a list
of partial choices by bytes, without those that another one beats in both bytes and loss and those whose reduced costs
exceed the gap; every partial choice that can be completed at the price p may lower the gap.

Worked example, budget 9 bytes:

    unit  (bytes, loss)              p = 2 per byte: loss + 2 bytes      reduced costs
    a     (2, 10) (4, 4) (6, 3)      14 12 15                            2 0 3
    b     (2, 8)  (5, 2)             12 12                               0 0

Bound: 12 + 12 - 2 * 9 = 6. Greedy takes a -> 4 bytes (a gain of 3 per byte), then b -> 5 bytes (2 per byte), loss 6: it
meets the bound, so it is optimal.

All of it is exact: losses become integers (multiples of at most 2**-60 of their sum, finer than doubles resolve that
sum) and are never rounded again.

Source: Sinha, Zoltners 1979 (the relaxation); Dyer, Kayal, Walker 1984 and Pisinger 1995, "A minimal algorithm for the
multiple-choice knapsack problem" (dynamic programming over few units, ordered by reduced cost, with bounds).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from penjing.errors import PlanError

Integers = NDArray[np.int64]

_LOSS_BITS = 60
"""Scaled losses sum to less than 2**60, so that differences and sums of two fit in int64."""


@dataclass(frozen=True)
class _Option:
    """A choice of one unit: its number, bytes above the unit's cheapest, scaled loss."""

    number: int
    size: int
    loss: int


def knapsack(sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    """The option to take for every unit: -> indices, one per unit.

    sizes   bytes of each option of each unit, >= 0
    losses  finite, of the same shape; may be negative
    budget  bytes that the chosen options may take together

    Among equal options the smaller is taken. Raises PlanError, naming the smallest budget that would do, when even the
    smallest options do not fit; ValueError when shapes differ or a loss is not finite.
    """
    _check(sizes, losses)
    least = [min(options) for options in sizes]
    if sum(least) > budget:
        raise PlanError(f"a budget of {budget:,} bytes is too small: the smallest options take {sum(least):,} bytes")
    scaled = _integers(losses)
    units = [
        _undominated([_Option(number, size - low, loss) for number, (size, loss) in enumerate(zip(*unit, strict=True))])
        for low, unit in zip(least, zip(sizes, scaled, strict=True), strict=True)
    ]
    return _solve(units, budget - sum(least))


def _check(sizes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]]) -> None:
    if [len(unit) for unit in sizes] != [len(unit) for unit in losses] or not all(sizes):
        raise ValueError("every unit needs at least one option, and a loss for each")
    if any(size < 0 for unit in sizes for size in unit):
        raise ValueError("sizes must not be negative")
    if not all(math.isfinite(loss) for unit in losses for loss in unit):
        raise ValueError("losses must be finite")


def _integers(losses: Sequence[Sequence[float]]) -> list[list[int]]:
    """Losses above each unit's smallest, times the largest power of two that keeps their sum below 2**_LOSS_BITS."""
    spans = [max(unit) - min(unit) for unit in losses]
    exponent = _LOSS_BITS - 1 - math.frexp(math.fsum(spans))[1]
    return [[round(math.ldexp(loss - min(unit), exponent)) for loss in unit] for unit in losses]


def _undominated(options: Sequence[_Option]) -> list[_Option]:
    """By size, without those that another option beats or equals in size and loss."""
    kept: list[_Option] = []
    for option in sorted(options, key=lambda option: (option.size, option.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


def _hull(options: Sequence[_Option]) -> list[_Option]:
    """Corners of the lower convex hull of loss over size: gains per byte fall from one to the next."""
    hull: list[_Option] = []
    for new in options:
        while len(hull) > 1:
            before, last = hull[-2:]
            if (before.loss - last.loss) * (new.size - last.size) > (last.loss - new.loss) * (last.size - before.size):
                break
            hull.pop()
        hull.append(new)
    return hull


def _greedy(units: Sequence[Sequence[_Option]], room: int) -> tuple[list[_Option], int]:
    """Walk the hulls, best gain per byte first: a solution, and the gain per byte at which a step first did not fit."""
    steps = []
    for unit, options in enumerate(units):
        hull = _hull(options)
        for before, after in pairwise(hull):
            steps.append(((before.loss - after.loss) / (after.size - before.size), unit, before, after))
    chosen = [options[0] for options in units]
    price = None
    for gain, unit, before, after in sorted(steps, key=lambda step: -step[0]):
        if chosen[unit] is before and after.size - before.size <= room:
            chosen[unit] = after
            room -= after.size - before.size
        elif price is None:
            price = round(gain)
    return chosen, price or 0


def _solve(units: Sequence[Sequence[_Option]], room: int) -> list[int]:
    greedy, price = _greedy(units, room)
    search = _Search(units, room, price, greedy)
    for unit in search.order():
        if search.gap <= 0:
            break
        search.extend(unit)
    return [option.number for option in search.best]


class _Search:
    """Partial choices over the units seen so far, and the best whole choice known.

    The arrays hold, for every partial choice, by rising size: its bytes, its loss, its reduced costs (int64).
    """

    def __init__(self, units: Sequence[Sequence[_Option]], room: int, price: int, known: Sequence[_Option]) -> None:
        self._units, self._room = units, room
        self._costs = [[option.loss + price * option.size for option in options] for options in units]
        self._at_price = [
            min(zip(costs, options, strict=True), key=lambda pair: pair[0])[1]
            for costs, options in zip(self._costs, units, strict=True)
        ]
        self._bound = sum(map(min, self._costs)) - price * room
        self._rest_size = sum(option.size for option in self._at_price)
        self._rest_loss = sum(option.loss for option in self._at_price)
        self._size, self._loss, self._reduced = (np.zeros(1, dtype=np.int64) for _ in range(3))
        self._taken: list[tuple[int, list[_Option], Integers, Integers]] = []
        self.best = list(known)
        self.gap = sum(option.loss for option in known) - self._bound

    def order(self) -> list[int]:
        """Units with more than one option, those with a second option close to their best first."""
        close = {unit: sorted(costs)[1] - min(costs) for unit, costs in enumerate(self._costs) if len(costs) > 1}
        return sorted(close, key=close.__getitem__)

    def extend(self, unit: int) -> None:
        """Take `unit` into the partial choices: every option whose reduced cost leaves hope, with every choice."""
        usual, low = self._at_price[unit], min(self._costs[unit])
        self._rest_size -= usual.size
        self._rest_loss -= usual.loss
        hopeful = [
            (option, cost - low)
            for option, cost in zip(self._units[unit], self._costs[unit], strict=True)
            if cost - low < self.gap
        ]
        size = np.add.outer(self._size, [option.size for option, _ in hopeful]).ravel()
        loss = np.add.outer(self._loss, [option.loss for option, _ in hopeful]).ravel()
        reduced = np.add.outer(self._reduced, [above for _, above in hopeful]).ravel()
        stay = self._frontier(size, loss, reduced)
        self._size, self._loss, self._reduced = size[stay], loss[stay], reduced[stay]
        parents, places = np.divmod(stay, len(hopeful))
        self._taken.append((unit, [option for option, _ in hopeful], parents, places))
        self._complete()

    def _frontier(self, size: Integers, loss: Integers, reduced: Integers) -> Integers:
        """Which partial choices stay, by rising size: within the budget and the gap, and beaten by none."""
        hope = np.flatnonzero((size <= self._room) & (reduced < self.gap))
        hope = hope[np.lexsort((loss[hope], size[hope]))]
        least = np.minimum.accumulate(loss[hope])
        first = np.ones(len(hope), dtype=bool)
        first[1:] = loss[hope][1:] < least[:-1]
        return hope[first]

    def _complete(self) -> None:
        """Give the units not yet seen their options at the price; remember the best of what fits."""
        fits = np.flatnonzero(self._size + self._rest_size <= self._room)
        if not len(fits):
            return
        state = int(fits[-1])  # losses fall as sizes rise, so the largest that fits is the best
        gap = int(self._loss[state]) + self._rest_loss - self._bound
        if gap >= self.gap:
            return
        self.gap = gap
        self.best = list(self._at_price)
        for unit, options, parents, places in reversed(self._taken):
            self.best[unit] = options[int(places[state])]
            state = int(parents[state])
