"""The scores by which units are kept, in one table: name, what it looks at, function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

from torch import Tensor

from penjing.methods.pruning import flap, llm_pruner, structured_obs, unit_norms, wanda_sp
from penjing.methods.pruning.units import Units

Evidence = Literal["weights", "inputs", "attention", "gradients"]


@dataclass(frozen=True)
class UnitScore:
    """One row: `function` takes the units and how many of them will go, and gives fp64 (U,); the highest stay.

    looks_at  weights alone, the inputs of the linear that reads the units, attention probabilities, or gradients
    """

    looks_at: Evidence
    function: Callable[[Units, int], Tensor]


def _wanda_sp(units: Units, drop: int) -> Tensor:
    return wanda_sp.wanda_sp(units.columns, units.power)


def _contribution(units: Units, drop: int) -> Tensor:
    assert units.gram is not None
    return unit_norms.contribution(units.columns, units.gram)


def _obs(units: Units, drop: int) -> Tensor:
    assert units.gram is not None
    return structured_obs.structured_obs(units.columns, units.gram, drop)


def _flap(units: Units, drop: int) -> Tensor:
    assert units.mean is not None
    return flap.flap(units.columns, units.power, units.mean.view_as(units.power), units.tokens)


def _taylor(units: Units, drop: int, *, order: llm_pruner.Order, granularity: llm_pruner.Granularity) -> Tensor:
    given = units.gradients
    assert given is not None
    weights, gradients = (units.columns, *units.rows), (given.columns, *given.rows)
    return llm_pruner.importance(weights, gradients, given.squares, order=order, granularity=granularity)


def _gradient(units: Units, drop: int) -> Tensor:
    assert units.gradients is not None
    return units.gradients.gates.double()


def _entropy(units: Units, drop: int) -> Tensor:
    assert units.entropy is not None
    return -units.entropy.double()


def taylor(order: llm_pruner.Order, granularity: llm_pruner.Granularity) -> UnitScore:
    """LLM-Pruner's importance as a score."""
    return UnitScore("gradients", partial(_taylor, order=order, granularity=granularity))


SCORES: dict[str, UnitScore] = {
    "magnitude-l1": UnitScore("weights", lambda units, drop: unit_norms.magnitude(units, 1)),
    "magnitude": UnitScore("weights", lambda units, drop: unit_norms.magnitude(units, 2)),
    "activation": UnitScore("inputs", lambda units, drop: unit_norms.activation(units)),
    "contribution": UnitScore("inputs", _contribution),
    "wanda-sp": UnitScore("inputs", _wanda_sp),
    "obs": UnitScore("inputs", _obs),
    "fluctuation": UnitScore("inputs", _flap),
    "taylor": taylor("first", "element"),
    "taylor-second": taylor("second", "element"),
    "taylor-mixed": taylor("mixed", "element"),
    "taylor-vector": taylor("first", "vector"),
    "gradient": UnitScore("gradients", _gradient),
    "entropy": UnitScore("attention", _entropy),
}
"""Name in a recipe -> score."""
