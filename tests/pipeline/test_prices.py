"""Budgets in parameters and in time: kept, spent as brute force would, refused with the least that can be reached."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest

from penjing import api
from penjing.checkpoint import open_checkpoint
from penjing.engines.latency import StepTime
from penjing.errors import PlanError
from penjing.models import layout_of
from penjing.pipeline import linear_times
from penjing.pipeline.choices import read_choices
from penjing.pipeline.linear_times import LinearTimes
from penjing.pipeline.menu import Menu
from penjing.pipeline.prices import Budget, Prices, prices
from penjing.recipe import load_recipe
from runs import recipe, texts

RTN: dict[str, Any] = {"method": "rtn", "group_size": 32}
CHOICES = "dense,4,2:4+4,svd-llm(rank=16)"


@pytest.fixture
def short(tmp_path: Path) -> dict[str, Any]:
    return texts(tmp_path / "texts")


def menu_of(path: Path, wanted: dict[str, Any], choices: str = CHOICES) -> Menu:
    checkpoint = open_checkpoint(path)
    return Menu.open(
        checkpoint, layout_of(checkpoint.config, checkpoint.specs()), load_recipe(wanted), read_choices(choices)
    )


def test_parameters_are_counted(tiny_model: Any, short: dict[str, Any]) -> None:
    menu = menu_of(tiny_model("llama"), recipe(short, RTN, format="native"))
    found = prices(menu, Budget(params="1M"))
    rows, columns = menu.layout.by_name[menu.units[1][0]].shape
    assert found.costs[1] == (rows * columns, rows * columns, rows * columns // 2, 16 * (rows + columns))
    assert found.totals[0] == menu.layout.parameters


def test_a_budget_of_parameters_is_spent_as_brute_force_would(tiny_model: Any, short: dict[str, Any]) -> None:
    model, wanted = tiny_model("llama"), recipe(short, RTN, format="native")
    menu = menu_of(model, wanted)
    totals = prices(menu, Budget(params="1M")).totals
    limit = (totals[0] + min(totals)) // 2
    result = api.allocate(model, wanted, params=limit, choices=CHOICES, by="output")
    assert result.cost <= limit == result.budget
    best = min(
        sum(share.losses[option] for share, option in zip(result.shares, options, strict=True))
        for options in product(range(4), repeat=len(result.shares))
        if result.prices.fixed + sum(share.costs[o] for share, o in zip(result.shares, options, strict=True)) <= limit
    )
    assert result.loss == pytest.approx(best, rel=1e-12)


def stand_in(menu: Menu) -> LinearTimes:
    """A machine whose time is the number of weights, where low rank takes its own number and all else is decoded."""
    rows = [{} if plan is None else {row.module.name: row for row in plan.rows} for plan in menu.plans]
    found: dict[tuple[str, int | None], int] = {}
    for name in (name for unit in menu.units for name in unit):
        shape = menu.layout.by_name[name].shape
        found[name, None] = shape[0] * shape[1]
        for choice, plan in enumerate(rows):
            rank = plan[name].scheme.rank if name in plan else 0
            found[name, choice] = rank * sum(shape) if rank else shape[0] * shape[1]
    return LinearTimes(menu.layout.parameters, menu.layout.head.parameters, found)


def test_a_budget_of_time(tiny_model: Any, short: dict[str, Any]) -> None:
    menu = menu_of(tiny_model("llama"), recipe(short, RTN, format="native"))
    found = prices(menu, Budget(speedup=1.25), stand_in)
    assert found.limit == int(menu.layout.parameters / 1.25)
    assert found.totals[:3] == (menu.layout.parameters,) * 3 > found.totals[3:] * 3
    same = prices(menu, Budget(latency=found.limit / 1e6), stand_in)
    assert same.limit == pytest.approx(found.limit, abs=1)
    with pytest.raises(PlanError, match=r"nanoseconds for a decoded token is too small: .* takes [\d,]+"):
        prices(menu, Budget(speedup=100), stand_in)


def test_times_are_measured_and_kept(
    tiny_model: Any, short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What nothing runs as it is stored takes the time of the dense linear, by definition."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(linear_times, "step_times", lambda configs: [StepTime(1.0, 1.0)])
    menu = menu_of(tiny_model("llama"), recipe(short, RTN, format="native"))
    times = [LinearTimes.measured(menu) for _ in range(2)]
    assert times[0] == times[1]
    name = menu.units[0][0]
    assert times[0].of(name, None) == times[0].of(name, 0) == times[0].of(name, 1) > 0
    assert times[0].of(name, 3) > 0
    assert times[0].dense == 3 * 10**9


def test_the_cheapest_where_nothing_fits() -> None:
    found = Prices("bytes", ((4, 2), (4, 2)), 1, 5)
    assert found.totals == (9, 5) and found.nearest() == 1
    assert Prices("bytes", found.costs, 1, 9).nearest() == 0


def test_refusals(tiny_model: Any, short: dict[str, Any]) -> None:
    menu = menu_of(tiny_model("llama"), recipe(short, RTN), "dense,4")
    for limits, words in (
        ({"params": "1K"}, r"1,000 parameters .* too small: .* takes [\d,]+ parameters; [\d,]+ of them are not up for"),
        ({"speedup": 2.0}, r"write `format: native`"),
        ({"speedup": 2.0, "bytes": 10}, r"either in bytes.*not bytes and speedup"),
        ({}, r"either in bytes"),
        ({"params": "many"}, r"not a number of parameters"),
        ({"latency": 0.0}, r"above zero"),
    ):
        with pytest.raises(PlanError, match=words):
            prices(menu, Budget(**limits))  # type: ignore[arg-type]
