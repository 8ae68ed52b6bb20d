"""How long one decoded token takes in every linear of a model under every choice, on this machine.

What a choice makes of random weights is run by the module that would run it in transformers, in turn with the dense
linear, on copies that do not fit in a cache together. A choice that nothing runs as it is stored is decoded when it is
loaded and takes the time of the dense linear: fewer bits are then smaller, not faster.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from penjing.engines.latency import remembered, step_times
from penjing.errors import PlanError
from penjing.methods.base import LinearInput
from penjing.numerics.precision import compute_dtype
from penjing.pipeline import factors
from penjing.pipeline.menu import Menu
from penjing.pipeline.sensitivity import run_step
from penjing.planning import Plan, PlanRow
from penjing.representations import Masked, Representation
from penjing.runtime import runner_for
from penjing.statistics import Gram, unseen

_COLD, _COPIES, _ROUNDS = 64 * 2**20, 16, 15
"""Bytes that copies of a linear take together, at most so many of them, and how often all are run."""


@dataclass(frozen=True)
class LinearTimes:
    """Whole nanoseconds.

    dense   for a token in the whole dense model
    head    of that, in the output head
    linear  by module and choice; None: dense
    """

    dense: int
    head: int
    linear: Mapping[tuple[str, int | None], int]

    def of(self, name: str, choice: int | None) -> int:
        """One token in one linear."""
        return self.linear[name, choice]

    @classmethod
    def measured(cls, menu: Menu) -> LinearTimes:
        """On this machine, or from its table. Raises PlanError for a format whose engine is another."""
        if menu.recipe.format != "native":
            raise PlanError(
                f"times of choices are those of transformers with format native; format {menu.recipe.format} is for "
                "other engines: write `format: native`, or give the budget in bytes or parameters"
            )
        config = {**menu.config, **(menu.whole.rewriting.config if menu.whole.rewriting else {})}
        (whole,) = step_times([config])
        found: dict[tuple[str, int | None], int] = {}
        for name in (name for unit in menu.units for name in unit):
            shape = menu.layout.by_name[name].shape
            for choice, plan in enumerate(menu.plans):
                row = None if plan is None else next(row for row in plan.rows if row.module.name == name)
                mine, plain = _times(plan, row, shape)
                found[name, choice] = mine
                found[name, None] = plain
        return cls(round(1e9 * whole.of(menu.layout.blocks)), round(1e9 * whole.head), found)


def _times(plan: Plan | None, row: PlanRow | None, shape: tuple[int, ...]) -> tuple[int, int]:
    """Nanoseconds of a linear under a choice, and of the dense one of its shape."""
    base = remembered(["linear", shape], lambda: {"linear": list(shape), "seconds": _alone(shape)})["seconds"]
    if plan is None or row is None or row.scheme.dense:
        return round(1e9 * base), round(1e9 * base)
    steps = [plan.recipe.steps[number].as_dict() for number in row.steps]
    words = [{key: value for key, value in step.items() if key not in ("targets", "ignore")} for step in steps]

    def made() -> dict[str, Any]:
        return {"linear": list(shape), "steps": words, "of_dense": _ratio(plan, row, shape)}

    return round(1e9 * base * remembered(["linear", shape, words], made)["of_dense"]), round(1e9 * base)


def _dense(shape: tuple[int, ...]) -> nn.Linear:
    linear = nn.Linear(shape[1], shape[0], bias=False, dtype=compute_dtype())
    return linear.requires_grad_(False)


def _ratio(plan: Plan, row: PlanRow, shape: tuple[int, ...]) -> float:
    """Time of what the choice makes of the linear over that of the dense one."""
    dense = _dense(shape)
    runner = runner_for(dense, row.scheme, _represented(plan, row, dense.weight.float()))
    if runner is None:
        return 1.0
    ours, theirs = _copies(runner, shape), _copies(dense, shape)
    return statistics.median(_seconds(ours, shape) / _seconds(theirs, shape) for _ in range(_ROUNDS))


def _alone(shape: tuple[int, ...]) -> float:
    copies = _copies(_dense(shape), shape)
    return statistics.median(_seconds(copies, shape) for _ in range(_ROUNDS)) / len(copies)


def _copies(module: nn.Module, shape: tuple[int, ...]) -> list[nn.Module]:
    """As many as of a dense linear fill a cache, whatever `module` takes itself: both sides run equally many."""
    return [copy.deepcopy(module) for _ in range(max(1, min(_COPIES, _COLD // (4 * shape[0] * shape[1]))))]


@torch.inference_mode()
def _seconds(modules: list[nn.Module], shape: tuple[int, ...]) -> float:
    token = torch.ones(1, 1, shape[1], dtype=compute_dtype())
    start = time.perf_counter()
    for module in modules:
        module(token)
    return time.perf_counter() - start


def _represented(plan: Plan, row: PlanRow, weight: torch.Tensor) -> Representation:
    """What the steps of a row make of a weight whose inputs are independent."""
    steps = [plan.recipe.steps[number] for number in row.steps]
    steps = [step for step in steps if step.definition.linear is not None]
    kinds = list(dict.fromkeys([Gram, *(kind for step in steps for kind in step.definition.needs(step.options))]))
    given = LinearInput(weight, unseen(kinds, weight.shape[1]), None, plan.dtype, (("linear", len(weight)),))
    result: Representation | None = None
    for step in steps:
        result = factors.apply(partial(run_step, step), given, result)
        kept = result.kept if isinstance(result, Masked) else given.kept
        given = LinearInput(result.dense().float(), given.statistics, kept, plan.dtype, given.parts)
    assert result is not None
    return result
