"""The search: never over the budget, never worse, and close to brute force where losses do or do not add up."""

import itertools
import random

import pytest

from penjing.methods.allocation.evopress import Search, evopress


def problem(seed, units=6, options=4):
    draw = random.Random(seed)
    sizes = [sorted(draw.sample(range(1, 30), options)) for _ in range(units)]
    losses = [sorted((draw.random() for _ in range(options)), reverse=True) for _ in range(units)]
    return sizes, losses, sum(map(min, sizes)) + 25


def weight(chosen, sizes):
    return sum(options[option] for options, option in zip(sizes, chosen, strict=True))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("together", [False, True])
def test_close_to_brute_force(seed, together):
    sizes, losses, budget = problem(seed)

    def loss(chosen):
        parts = [losses[unit][option] for unit, option in enumerate(chosen)]
        return sum(parts) + (sum(a * b for a, b in itertools.pairwise(parts)) if together else 0.0)

    measured = []

    def fitness(assignments, stage):
        measured.extend(assignments)
        return [loss(assignment) for assignment in assignments]

    told = []
    found, first, last = evopress(
        [0] * 6, sizes, budget, fitness, Search(60, 16, (6, 3), seed), lambda at, value: told.append(value)
    )
    every = (chosen for chosen in itertools.product(range(4), repeat=6) if weight(chosen, sizes) <= budget)
    best = min(map(loss, every))
    assert best - 1e-9 <= last == loss(found) <= 1.1 * best
    assert first == loss((0,) * 6)
    assert told == sorted(told, reverse=True) and len(told) == 60
    assert all(weight(chosen, sizes) <= budget for chosen in measured)


def test_only_the_last_stage_replaces_the_parent():
    """What looks good on a little text and is not does not win."""

    def fitness(assignments, stage):
        return [float(sum(chosen)) if stage else -float(sum(chosen)) for chosen in assignments]

    found, first, last = evopress([0, 0], [[1, 2], [1, 2]], 4, fitness, Search(5, 4, (1,)))
    assert found == (0, 0) and first == last == 0


def test_nothing_to_switch_and_a_start_over_the_budget():
    assert evopress([0], [[3]], 3, lambda given, stage: [1.0] * len(given), Search(3, 2))[0] == (0,)
    with pytest.raises(ValueError, match="over the budget"):
        evopress([0], [[3]], 2, lambda given, stage: [1.0] * len(given), Search())
