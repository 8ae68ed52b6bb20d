"""What runs beside a model, or in place of its parts: caches, kernels, and linears that compute with codes."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from penjing.numerics.activations import InputScale
from penjing.representations import Representation, Scheme
from penjing.runtime import embedding, factored, int8, lut, ternary
from penjing.runtime.inputs import RoundInputs

Runner = Callable[[nn.Module, Scheme, Representation, InputScale | None], Callable[[], nn.Module] | None]
"""Live linear, scheme, weight and static input scale -> what makes the module that runs it, or None when none can."""

RUNNERS: tuple[Runner, ...] = (int8.runner, lut.runner, ternary.runner, factored.runner)
"""In order of preference."""

__all__ = ["RUNNERS", "RoundInputs", "Runner", "can_run", "runner_for"]


def runner_for(
    linear: nn.Module, scheme: Scheme, weight: Representation, static: InputScale | None = None
) -> nn.Module | None:
    """The module that computes with the codes of `weight` in place of a live `linear` (nn.Linear, Conv1D,
    nn.Embedding).

    Device and bias are those of `linear`. None: the linear stays dense, and rounds its inputs if the scheme says so.
    """
    make = _first(linear, scheme, weight, static)
    return None if make is None else make()


def can_run(linear: nn.Module, scheme: Scheme, weight: Representation) -> bool:
    """Whether `runner_for` has a module for it; packs nothing."""
    return _first(linear, scheme, weight, None) is not None


def _first(
    linear: nn.Module, scheme: Scheme, weight: Representation, static: InputScale | None
) -> Callable[[], nn.Module] | None:
    if isinstance(linear, nn.Embedding):
        return embedding.runner(linear, weight)
    found = (run(linear, scheme, weight, static) for run in RUNNERS)
    return next((make for make in found if make is not None), None)
