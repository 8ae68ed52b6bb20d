"""What every choice costs in the measure of the budget: bytes, parameters, or the time of a decoded token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from penjing.errors import PlanError
from penjing.methods.pruning.sizes import parse_count
from penjing.pipeline.linear_times import LinearTimes
from penjing.pipeline.menu import Menu
from penjing.planning import PlanRow
from penjing.representations import Scheme

Measure = Literal["bytes", "parameters", "latency"]

WORDS: dict[Measure, str] = {
    "bytes": "bytes",
    "parameters": "parameters that are not zero",
    "latency": "nanoseconds for a decoded token",
}
"""What a number in each measure counts."""


@dataclass(frozen=True)
class Budget:
    """What the whole model may take: exactly one of these.

    bytes    of all tensors, as a plan counts them
    bits     per weight of the linears up for choice, with all that is stored for them
    params   weights that are not zero: "100M", or a number
    latency  milliseconds for a decoded token at batch 1, on this machine
    speedup  the dense model's time for a token over the result's, on this machine
    """

    bytes: int | None = None
    bits: float | None = None
    params: int | str | None = None
    latency: float | None = None
    speedup: float | None = None

    def __post_init__(self) -> None:
        given = {key: value for key, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise PlanError(
                "give the budget either in bytes (of the whole model), in bits (per weight allocated), in params, as "
                "latency (milliseconds per token) or as speedup" + (f"; not {' and '.join(given)}" if given else "")
            )
        if (self.latency is not None and self.latency <= 0) or (self.speedup is not None and self.speedup <= 0):
            raise PlanError("a latency or a speedup is a number above zero")
        if self.params is not None:
            try:
                parse_count(self.params)
            except ValueError as error:
                raise PlanError(str(error)) from error


@dataclass(frozen=True)
class Prices:
    """Costs in whole numbers of one measure.

    costs  by unit and choice
    fixed  of everything else
    limit  that all of it may take together
    """

    measure: Measure
    costs: tuple[tuple[int, ...], ...]
    fixed: int
    limit: int

    @property
    def totals(self) -> tuple[int, ...]:
        """Of the whole model with one choice everywhere."""
        return tuple(self.fixed + sum(costs) for costs in zip(*self.costs, strict=True))

    def nearest(self) -> int:
        """The dearest choice that fits everywhere; the cheapest of all if none does."""
        fitting = [choice for choice, total in enumerate(self.totals) if total <= self.limit]
        return max(fitting, key=self.totals.__getitem__) if fitting else self.totals.index(min(self.totals))


def prices(menu: Menu, budget: Budget, times: Callable[[Menu], LinearTimes] = LinearTimes.measured) -> Prices:
    """The costs of all choices, and the limit. Raises PlanError naming the least that can be reached."""
    if budget.bytes is not None or budget.bits is not None:
        return Prices("bytes", menu.sizes, menu.fixed, menu.limit(budget.bytes, budget.bits))
    if budget.params is not None:
        costs = tuple(
            tuple(map(sum, zip(*(_weights(menu, name) for name in unit), strict=True))) for unit in menu.units
        )
        return _possible(Prices("parameters", costs, menu.layout.parameters - menu.weights, parse_count(budget.params)))
    table = times(menu)
    costs = tuple(
        tuple(sum(table.of(name, choice) for name in unit) for choice in range(len(menu.choices)))
        for unit in menu.units
    )
    fixed = max(0, table.dense - sum(table.of(name, None) for unit in menu.units for name in unit))
    limit = 1e6 * budget.latency if budget.latency is not None else table.dense / (budget.speedup or 1)
    return _possible(Prices("latency", costs, fixed, int(limit)))


def _weights(menu: Menu, name: str) -> list[int]:
    """Of one linear, by choice: weights that are not zero, and its bias."""
    module = menu.layout.by_name[name]
    rows = [None if plan is None else next(row for row in plan.rows if row.module.name == name) for plan in menu.plans]
    rest = module.parameters - module.shape[0] * module.shape[1]
    return [rest + _stored(row, module.shape) for row in rows]


def _stored(row: PlanRow | None, shape: tuple[int, ...]) -> int:
    scheme = Scheme() if row is None else row.scheme
    weights = (scheme.rank or 0) * sum(shape) or shape[0] * shape[1]
    return round(weights * (1 - scheme.sparsity)) + scheme.correction * sum(shape)


def _possible(found: Prices) -> Prices:
    least = found.fixed + sum(map(min, found.costs))
    if least > found.limit:
        raise PlanError(
            f"a budget of {found.limit:,} {WORDS[found.measure]} is too small: with the smallest choices everywhere "
            f"the model takes {least:,}; {found.fixed:,} of them are not up for choice (embeddings, norms and the like)"
        )
    return found
