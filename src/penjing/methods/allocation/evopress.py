"""EvoPress: improve an allocation by trial, where what counts is the measured loss of the whole model.

Losses of units do not add up: a unit may cost more, or less, beside others than alone. So a whole assignment x of
options to units is judged by a loss f(x), measured, and improved:

    offspring   copies of x, each with a few level switches: one unit takes a larger option, and other units, drawn at
                random, take smaller ones until the budget holds again
    selection   all offspring are judged on a little text, the best few of them on more, the last few together with x
                on most: only there can x be replaced, and only by what is better on the same text

so the loss on the most text never rises. The start is any assignment within the budget, here the knapsack's.

Worked example: sizes 1 or 2 for two units, budget 3, f = 1 where unit 0 is large and 0 where unit 1 is. From x = [1, 0]
(options), the only switch raises unit 1 and lowers unit 0: [0, 1], which is better and stays.

Source: Sieberling, Kuznedelev, Kurtic, Alistarh 2025, "EvoPress" (arXiv:2410.14649), algorithm 1, with bytes instead of
levels of equal size.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Assignment = tuple[int, ...]
"""The option of every unit."""

Fitness = Callable[[Sequence[Assignment], int], list[float]]
"""Losses of assignments, lower is better, measured on the text of a stage of selection."""


@dataclass(frozen=True)
class Search:
    """How long and how wide to search.

    generations  rounds of offspring and selection
    offspring    of each round
    survivors    of each stage of selection but the last, which keeps one
    seed         of what is drawn
    """

    generations: int = 20
    offspring: int = 16
    survivors: tuple[int, ...] = (4,)
    seed: int = 0

    @property
    def stages(self) -> int:
        """How many there are."""
        return len(self.survivors) + 1


def evopress(
    start: Sequence[int],
    sizes: Sequence[Sequence[int]],
    budget: int,
    fitness: Fitness,
    search: Search,
    report: Callable[[int, float], None] = lambda generation, loss: None,
) -> tuple[Assignment, float, float]:
    """The best assignment found, and the losses of `start` and of it on the text of the last stage.

    sizes   bytes of each option of each unit
    budget  bytes that an assignment may take; ValueError when `start` takes more
    report  hears of every generation and the loss after it
    """
    best = tuple(start)
    if _total(best, sizes) > budget:
        raise ValueError("the start of the search is over the budget")
    draw = random.Random(search.seed)
    last = search.stages - 1
    first = loss = fitness([best], last)[0]
    for generation in range(search.generations):
        found = {_mutated(best, sizes, budget, draw) for _ in range(search.offspring)} - {best}
        rivals = sorted(found)
        for stage, count in enumerate(search.survivors):
            if len(rivals) > count:
                judged = fitness(rivals, stage)
                rivals = [rival for _, rival in sorted(zip(judged, rivals, strict=True))][:count]
        for rival, value in zip(rivals, fitness(rivals, last) if rivals else [], strict=True):
            if value < loss:
                best, loss = rival, value
        report(generation, loss)
    return best, first, loss


def _total(chosen: Sequence[int], sizes: Sequence[Sequence[int]]) -> int:
    return sum(options[option] for options, option in zip(sizes, chosen, strict=True))


def _mutated(parent: Assignment, sizes: Sequence[Sequence[int]], budget: int, draw: random.Random) -> Assignment:
    """A copy with one to three level switches, fewer more often; the parent itself where none is possible."""
    child = list(parent)
    for _ in range(min(draw.randint(1, 3), draw.randint(1, 3))):
        if larger := [unit for unit in range(len(child)) if _next(sizes[unit], child[unit], 1) is not None]:
            raised = draw.choice(larger)
            child[raised] = _next(sizes[raised], child[raised], 1) or 0
            while _total(child, sizes) > budget:
                others = [unit for unit in range(len(child)) if unit != raised]
                smaller = [unit for unit in others if _next(sizes[unit], child[unit], -1) is not None]
                if not smaller:
                    return parent
                lowered = draw.choice(smaller)
                child[lowered] = _next(sizes[lowered], child[lowered], -1) or 0
    return tuple(child)


def _next(options: Sequence[int], at: int, direction: int) -> int | None:
    """The option of the next larger (1) or smaller (-1) size; None where there is none."""
    further = [option for option, size in enumerate(options) if direction * (size - options[at]) > 0]
    return min(further, key=lambda option: abs(options[option] - options[at]), default=None)
