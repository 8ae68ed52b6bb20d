"""Blocks that may go beside choices for their units: equal to trying everything."""

import random
from itertools import product

import pytest

from penjing.errors import PlanError
from penjing.methods.allocation.blocks import Block, knapsack_of_blocks


def total(costs, losses, blocks, chosen, gone):
    kept = [block for number, block in enumerate(blocks) if number not in gone]
    cost = sum(block.rest + sum(costs[unit][chosen[unit]] for unit in block.units) for block in kept)
    loss = sum(losses[unit][chosen[unit]] for block in kept for unit in block.units)
    return cost, loss + sum(blocks[number].loss for number in gone)


def brute_force(costs, losses, blocks, budget):
    found = []
    for gone in product((False, True), repeat=len(blocks)):
        absent = {number for number, away in enumerate(gone) if away}
        for chosen in product(*(range(len(unit)) for unit in costs)):
            cost, loss = total(costs, losses, blocks, chosen, absent)
            if cost <= budget:
                found.append(loss)
    return min(found)


@pytest.mark.parametrize("seed", range(12))
def test_equals_brute_force(seed):
    draw = random.Random(seed)
    units = [draw.randint(1, 3) for _ in range(3)]
    costs = [[draw.randint(0, 30) for _ in range(draw.randint(1, 3))] for _ in range(sum(units))]
    losses = [[draw.random() for _ in unit] for unit in costs]
    blocks, start = [], 0
    for count in units:
        blocks.append(Block(tuple(range(start, start + count)), draw.randint(0, 5), draw.random() * count))
        start += count
    for budget in (0, 20, 60, 100, 300):
        chosen, gone = knapsack_of_blocks(costs, losses, blocks, budget)
        cost, loss = total(costs, losses, blocks, chosen, gone)
        assert cost <= budget
        assert loss == pytest.approx(brute_force(costs, losses, blocks, budget), rel=1e-12)


def test_the_worked_example():
    costs, losses = [[1, 3], [1, 2]], [[4.0, 1.0], [2.0, 0.0]]
    assert knapsack_of_blocks(costs, losses, [Block((0, 1), 0, 5.0)], 3) == ([0, 1], [])
    assert knapsack_of_blocks(costs, losses, [Block((0, 1), 0, 5.0)], 2)[1] == [0]


def test_nothing_fits():
    with pytest.raises(PlanError, match="too small"):
        knapsack_of_blocks([[1]], [[0.0]], [Block((0,), 0, 1.0)], -1)
