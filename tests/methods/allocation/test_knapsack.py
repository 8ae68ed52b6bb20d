"""The solver against brute force, and its promises: never over budget, never worse with more room, fast enough."""

from __future__ import annotations

import itertools
import random
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penjing.errors import PlanError
from penjing.methods.allocation.knapsack import knapsack

Unit = list[tuple[int, float]]


def solve(units: list[Unit], budget: int) -> tuple[int, float]:
    """Bytes and loss of the solver's choice."""
    sizes = [[size for size, _ in unit] for unit in units]
    losses = [[loss for _, loss in unit] for unit in units]
    chosen = knapsack(sizes, losses, budget)
    taken = [unit[option] for unit, option in zip(units, chosen, strict=True)]
    return sum(size for size, _ in taken), sum(loss for _, loss in taken)


def brute_force(units: list[Unit], budget: int) -> float:
    return min(
        sum(loss for _, loss in choice)
        for choice in itertools.product(*units)
        if sum(size for size, _ in choice) <= budget
    )


def least(units: list[Unit]) -> int:
    return sum(min(size for size, _ in unit) for unit in units)


# Whole losses are summed without rounding, by the solver and by brute force alike.
small_units = st.lists(
    st.lists(st.tuples(st.integers(0, 30), st.integers(-50, 50).map(float)), min_size=1, max_size=5),
    min_size=1,
    max_size=5,
)


@settings(max_examples=300, deadline=None)
@given(units=small_units, room=st.integers(0, 100))
def test_optimal(units: list[Unit], room: int) -> None:
    budget = least(units) + room
    size, loss = solve(units, budget)
    assert size <= budget
    assert loss == brute_force(units, budget)


@settings(max_examples=100, deadline=None)
@given(units=small_units, room=st.integers(0, 100), scale=st.sampled_from([1, 977, 10**9 + 7]))
def test_optimal_with_large_sizes_and_losses_like_bits(units: list[Unit], room: int, scale: int) -> None:
    """Losses fall and sizes rise from option to option, by factors that are no whole numbers."""
    units = [sorted({(scale * size + number, 3.7**-number) for number, (size, _) in enumerate(unit)}) for unit in units]
    budget = least(units) + scale * room
    size, loss = solve(units, budget)
    assert size <= budget
    assert loss == pytest.approx(brute_force(units, budget), rel=1e-12)


@settings(max_examples=50, deadline=None)
@given(units=small_units, rooms=st.lists(st.integers(0, 120), min_size=2, max_size=6))
def test_more_room_never_costs_more(units: list[Unit], rooms: list[int]) -> None:
    losses = [solve(units, least(units) + room)[1] for room in sorted(rooms)]
    assert losses == sorted(losses, reverse=True)


def test_the_example_of_the_documentation() -> None:
    assert knapsack([[2, 4, 6], [2, 5]], [[10, 4, 3], [8, 2]], 9) == [1, 1]


def test_the_relaxation_misleads() -> None:
    """Best gain per byte first takes the small step and then has no room for the large one."""
    assert solve([[(0, 10.0), (1, 8.0)], [(0, 100.0), (10, 90.0)]], 10) == (10, 100.0)


def test_of_equal_options_the_smaller() -> None:
    assert knapsack([[8, 4, 4]], [[1.0, 1.0, 1.0]], 10) == [1]


@pytest.mark.parametrize("kind", ["random", "kinds", "alike"])
def test_a_model_of_six_hundred_matrices(kind: str) -> None:
    """600 units of 8 options and 10**10 bytes in seconds, never below the bound of the relaxation."""
    dice = random.Random(0)
    units = []
    for number in range(600):
        weights = (16_777_216, 50_331_648, 45_088_768, 4_194_304)[number % 4]
        weights = weights // dice.randint(1, 3) if kind == "random" else weights
        sensitivity = {"random": dice.lognormvariate(0, 1.5), "kinds": 1.0 + number % 4, "alike": 1.0}[kind]
        sizes = [(bits, weights * bits // 8 + weights // 32 + 173 + bits) for bits in (2, 3, 4, 5, 6, 8, 10, 16)]
        units.append([(size, sensitivity * dice.uniform(0.9, 1.1) * 4.0**-bits) for bits, size in sizes])
    budget = 10**10 if kind != "random" else 6 * 10**9
    start = time.perf_counter()
    size, loss = solve(units, budget)
    assert time.perf_counter() - start < 20
    assert size <= budget
    assert loss >= relaxed(units, budget) * (1 - 1e-9)


def test_losses_proportional_to_sizes() -> None:
    """Every option is as good as every other for its bytes: only filling the budget counts (subset sum)."""
    dice = random.Random(0)
    units = [[(size, -float(size)) for size in dice.sample(range(0, 200, 3), 4)] for _ in range(40)]
    budget = least(units) + 1000
    reachable = {0}
    for unit in units:
        reachable = {before + size for before in reachable for size, _ in unit if before + size <= budget}
    assert solve(units, budget) == (max(reachable), -float(max(reachable)))


def relaxed(units: list[Unit], budget: int) -> float:
    """The best Lagrangian bound over a fine sweep of prices, in plain floats."""
    prices = [10 ** (exponent / 20) for exponent in range(-400, 0)]
    return max(
        sum(min(loss + price * size for size, loss in unit) for unit in units) - price * budget for price in prices
    )


def test_a_budget_that_is_too_small_says_what_would_do() -> None:
    with pytest.raises(PlanError, match=r"budget of 999 bytes is too small: the smallest options take 1,000 bytes"):
        knapsack([[400, 500], [600, 700]], [[2.0, 1.0], [2.0, 1.0]], 999)
    assert knapsack([[400, 500], [600, 700]], [[2.0, 1.0], [2.0, 1.0]], 1000) == [0, 0]


@pytest.mark.parametrize(
    ("sizes", "losses", "words"),
    [
        ([[1, 2]], [[1.0]], "a loss for each"),
        ([[]], [[]], "at least one option"),
        ([[1]], [[float("nan")]], "finite"),
        ([[1]], [[float("inf")]], "finite"),
        ([[-1]], [[0.0]], "negative"),
    ],
)
def test_refuses(sizes: list[list[int]], losses: list[list[float]], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        knapsack(sizes, losses, 10)


def test_nothing_to_choose() -> None:
    assert knapsack([], [], 0) == []
    assert knapsack([[5], [6]], [[1.0], [2.0]], 11) == [0, 0]
