"""What every choice costs in the measure of the budget: bytes, parameters, or the time of a decoded token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from penjing.errors import PlanError
from penjing.methods.allocation.blocks import Block
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
                "give the budget either in bytes (of the whole model) or in bits (per weight allocated), in params, as "
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
    rests  by block, the part of `fixed` that goes with it; empty where no block may go
    weights  number of weights; bytes are also said as bits of each; None in other measures
    """

    measure: Measure
    costs: tuple[tuple[int, ...], ...]
    fixed: int
    limit: int
    rests: tuple[int, ...] = ()
    weights: int | None = None

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
    layout, inside = menu.layout, {name for unit in menu.units for name in unit}
    others = [[m for m in layout.of_block(index) if m.name not in inside] for index in range(layout.blocks)]
    if budget.bytes is not None or budget.bits is not None:
        room = menu.fixed + int(menu.weights * (budget.bits or 0) / 8)
        size = {row.module.name: row.bytes for row in menu.whole.rows}
        found = Prices("bytes", menu.sizes, menu.fixed, room if budget.bytes is None else budget.bytes)
        return _possible(replace(found, weights=menu.weights), menu, [sum(size[m.name] for m in b) for b in others])
    if budget.params is not None:
        costs = tuple(
            tuple(map(sum, zip(*(_weights(menu, name) for name in unit), strict=True))) for unit in menu.units
        )
        fixed = layout.parameters - sum(layout.by_name[name].parameters for name in inside)
        found = Prices("parameters", costs, fixed, parse_count(budget.params))
        return _possible(found, menu, [sum(module.parameters for module in block) for block in others])
    table = times(menu)
    costs = tuple(
        tuple(sum(table.of(name, choice) for name in unit) for choice in range(len(menu.choices)))
        for unit in menu.units
    )
    fixed = max(table.head, table.dense - sum(table.of(name, None) for name in inside))
    limit = 1e6 * budget.latency if budget.latency is not None else table.dense / (budget.speedup or 1)
    found = Prices("latency", costs, fixed, int(limit))
    return _possible(found, menu, [(fixed - table.head) // layout.blocks] * layout.blocks)


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


def blocks_of(menu: Menu, found: Prices, losses: Sequence[float]) -> list[Block]:
    """The blocks of a model, for the knapsack; `losses` of the model without each of them."""
    owner = [menu.layout.by_name[unit[0]].block for unit in menu.units]
    return [
        Block(tuple(unit for unit, block in enumerate(owner) if block == index), rest, loss)
        for index, (rest, loss) in enumerate(zip(found.rests, losses, strict=True))
    ]


def _possible(found: Prices, menu: Menu, rests: Sequence[int]) -> Prices:
    """The prices, with what goes with each block where blocks may go. Raises PlanError when nothing fits."""
    cheapest = [min(costs) for costs in found.costs]
    least, how = found.fixed + sum(cheapest), "with the smallest choices everywhere"
    if menu.drops:
        found = replace(found, rests=tuple(rests))
        alone = [
            block.rest + sum(cheapest[u] for u in block.units) for block in blocks_of(menu, found, [0.0] * len(rests))
        ]
        least, how = found.fixed - sum(rests) + min(alone), "with one block left and the smallest choices in it"
    if least > found.limit:
        bits = ""
        if found.weights is not None:
            bits = f" ({8 * (least - found.fixed) / found.weights:.3f} bits per weight of the linears)"
        raise PlanError(
            f"a budget of {found.limit:,} {WORDS[found.measure]} is too small: {how} the model takes {least:,} "
            f"{found.measure if found.measure != 'latency' else 'ns'}{bits}; {found.fixed:,} of them are not up for "
            "choice (embeddings, norms and the like)"
        )
    return found
