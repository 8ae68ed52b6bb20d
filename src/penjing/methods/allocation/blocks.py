"""The knapsack of units with one more choice: a whole block goes, with all of its units.

A block is removed or its units choose freely, so the choices of its units are first made one: of all combinations,
those stay that no other beats in both cost and loss (found unit by unit, which loses none). Beside them stands the
removal, which costs nothing and loses what was measured. One option per block is then an ordinary multiple-choice
knapsack, so the whole is exact.

Worked example, one block of two units, costs and losses (1, 4) (3, 1) and (1, 2) (2, 0), removal loses 5, budget 3:

    combinations  (2, 6) (3, 4) (4, 3) (5, 1)        with removal (0, 5): (2, 6) is beaten; 3 buys the loss 4

Source: the removal of blocks beside other choices as in Sieberling et al. 2025, "EvoPress" (arXiv:2410.14649); exact
here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from penjing.methods.allocation.knapsack import knapsack

_Combination = tuple[int, float, tuple[int, ...]]
"""Cost, loss, the option of every unit."""


@dataclass(frozen=True)
class Block:
    """What is known of a block.

    units  numbers of its units
    rest   what goes with the block beside its units (norms), in the measure of the costs
    loss   of the model without it
    """

    units: tuple[int, ...]
    rest: int
    loss: float


def knapsack_of_blocks(
    costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], blocks: Sequence[Block], budget: int
) -> tuple[list[int], list[int]]:
    """The option of every unit, and the numbers of the blocks that go; options of their units mean nothing.

    costs, losses  by unit and option, as for `knapsack`; every unit is in exactly one block
    budget         what units and rests may take together

    Raises PlanError when nothing fits. All blocks may go where nothing else fits.
    """
    menus = [_combinations([costs[unit] for unit in b.units], [losses[unit] for unit in b.units]) for b in blocks]
    sizes = [[0, *(cost + block.rest for cost, _, _ in menu)] for block, menu in zip(blocks, menus, strict=True)]
    lost = [[block.loss, *(loss for _, loss, _ in menu)] for block, menu in zip(blocks, menus, strict=True)]
    chosen, gone = [0] * len(costs), []
    for number, taken in enumerate(knapsack(sizes, lost, budget)):
        if not taken:
            gone.append(number)
            continue
        for unit, option in zip(blocks[number].units, menus[number][taken - 1][2], strict=True):
            chosen[unit] = option
    return chosen, gone


def _combinations(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]]) -> list[_Combination]:
    """Of all combinations of options, by rising cost, those that no other beats or equals."""
    found: list[_Combination] = [(0, 0.0, ())]
    for unit in zip(costs, losses, strict=True):
        longer = [
            (cost + more, loss + worse, (*options, option))
            for cost, loss, options in found
            for option, (more, worse) in enumerate(zip(*unit, strict=True))
        ]
        found = []
        for combination in sorted(longer, key=lambda one: one[:2]):
            if not found or combination[1] < found[-1][1]:
                found.append(combination)
    return found
