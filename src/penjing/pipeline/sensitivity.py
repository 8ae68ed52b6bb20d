"""Measuring what every choice for every unit costs, in one walk over the dense model (and one back, for gradients)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from penjing.checkpoint.base import Checkpoint
from penjing.errors import CalibrationError
from penjing.evaluation.metrics import Comparison
from penjing.methods.allocation.sensitivity import expected_kl, extrapolated, output_errors, relative_error
from penjing.methods.base import LinearInput
from penjing.models import find
from penjing.models.layout import Layout
from penjing.numerics.finite import all_finite
from penjing.pipeline import factors
from penjing.pipeline.block_tensors import BlockTensors
from penjing.pipeline.cache import BlockCache
from penjing.pipeline.gradients import (
    GRADIENT_WINDOWS,
    PROBE_LENGTH,
    SquaredGradients,
    squared_gradients,
    weighted_grams,
)
from penjing.pipeline.observe import Observer
from penjing.pipeline.parallel import side_by_side
from penjing.pipeline.stream import StreamedModel, batches
from penjing.pipeline.weights import Weights
from penjing.planning import Plan
from penjing.progress import Progress
from penjing.recipe import Step
from penjing.representations import Masked, Representation
from penjing.statistics import Gram, Statistics, StatisticType, compares, unseen

Sensitivity = Literal["output", "gradient", "kl"]

PROBE_WINDOWS = 4
"""Windows of `PROBE_LENGTH` on which divergences are measured: a forward pass for every unit."""


@dataclass(frozen=True)
class Question:
    """What is to be measured.

    units    linears by full name, those that share a choice together
    plans    one per choice, the model with that choice everywhere; None: everything dense
    by       the estimate (see `penjing.methods.allocation.sensitivity`)
    probe    the choice whose divergence is measured; the others follow by the ratio of output errors
    """

    units: Sequence[Sequence[str]]
    plans: Sequence[Plan | None]
    by: Sensitivity
    probe: int


@dataclass(frozen=True)
class _Part:
    """The linears of one unit in one block.

    errors    by choice: relative output error, or the divergence expected from gradients
    probe     the choice to measure: the one asked for, or the nearest to it that changes anything
    replaced  live parameters of the block under that choice
    """

    unit: int
    errors: list[float]
    probe: int
    replaced: dict[str, Tensor]


class SensitivityWalk:
    """One pass over the dense model. Names inside a block are relative to it.

    tokens  calibration windows (S, T)
    dtype   of the calibration arithmetic; gradients and divergences are measured in fp32
    store   is handed what every choice made of every linear: full name, choice, (N, K)
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: Layout,
        question: Question,
        tokens: Tensor,
        *,
        dtype: torch.dtype,
        progress: Progress,
        store: Callable[[str, int, Tensor], None] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.layout, self.question, self.tokens = layout, question, tokens
        self.dtype, self.progress, self._store = dtype, progress, store
        self._cache = BlockCache(checkpoint)
        source = Weights(checkpoint, layout).live
        self.stream = StreamedModel(checkpoint.config, layout, source, trust_remote_code=trust_remote_code)
        self._rows = [{} if plan is None else {row.module.name: row for row in plan.rows} for plan in question.plans]
        self._losses = [[0.0] * len(question.plans) for _ in question.units]
        self._gradients: Mapping[str, SquaredGradients] = {}
        self._probes: list[tuple[_Part, Tensor]] = []
        self._seen = 0

    def run(self) -> list[list[float]]:
        """Loss by unit and choice; nats per token for `gradient` and `kl`, a ratio for `output`."""
        windows = GRADIENT_WINDOWS if self.question.by == "gradient" else PROBE_WINDOWS
        probe_tokens = self.tokens[:windows, :PROBE_LENGTH]
        self._seen = probe_tokens.numel()
        if self.question.by == "gradient":
            linears = self.layout.inside_blocks(name for unit in self.question.units for name in unit)
            self._gradients = squared_gradients(self.stream, probe_tokens, linears, self.progress)
        probe = None if self.question.by == "output" else self.stream.embed(probe_tokens, torch.float32)
        states = self.stream.embed(self.tokens, self.dtype)
        for index in range(self.layout.blocks):
            self.progress("measure sensitivity", index, self.layout.blocks, self.layout.block_name(index))
            self._block(index, states, probe)
            self._cache.clear()
        self.progress("measure sensitivity", self.layout.blocks, self.layout.blocks, "")
        if probe is not None and self.question.by == "kl":
            self._measure_divergences(probe_tokens, probe)
        return self._losses

    def _block(self, index: int, states: Tensor, probe: Tensor | None) -> None:
        prefix = f"{self.layout.block_name(index)}."
        parts = [
            (unit, [name.removeprefix(prefix) for name in names if name.startswith(prefix)])
            for unit, names in enumerate(self.question.units)
        ]
        parts = [(unit, names) for unit, names in parts if names]
        with self.stream.block(index, self.dtype) as block:
            statistics = self._observe(block, index, states, [name for _, names in parts for name in names])
            self.stream.advance(block, index, states)
        weighted: Mapping[str, Gram] = {}
        if probe is not None and self.question.by == "gradient":
            weighted = weighted_grams(self.stream, index, probe, list(statistics), self._gradients)
        measured = [self._part(unit, prefix, names, statistics, weighted) for unit, names in parts]
        if probe is not None and self.question.by == "kl":
            self._advance_probes(index, probe, [part for part in measured if any(part.errors)])
            return
        for part in measured:
            self._add(part.unit, part.errors)

    def _add(self, unit: int, losses: Sequence[float]) -> None:
        self._losses[unit] = [before + loss for before, loss in zip(self._losses[unit], losses, strict=True)]

    def _observe(self, block: nn.Module, index: int, states: Tensor, names: Sequence[str]) -> dict[str, Statistics]:
        """Gram matrices of the inputs of `names`, and what the steps need besides."""
        prefix = f"{self.layout.block_name(index)}."
        needs: dict[str, list[StatisticType]] = {}
        for name in names:
            steps = [step for choice in range(len(self._rows)) for step in self._steps(choice, prefix + name)]
            kinds = [kind for step in steps for kind in step.definition.needs(step.options)]
            needs[name] = list(dict.fromkeys([Gram, *kinds]))
        with Observer(block, find, needs) as observer:
            for batch in batches(states):
                with observer.forward():
                    self.stream.run(block, index, batch)
                if any(compares(kind) for kinds in needs.values() for kind in kinds):
                    with observer.beside():  # the model walked is the dense one itself
                        self.stream.run(block, index, batch)
        found: dict[str, Statistics] = {}
        for name, kinds in needs.items():
            columns = self.layout.by_name[prefix + name].shape[1]
            found[name] = observer.statistics.get(name) or unseen(kinds, columns)
            if not all_finite(found[name][Gram].value):
                raise CalibrationError(f"the inputs of {prefix}{name} contain NaN or infinite values")
        return found

    def _steps(self, choice: int, name: str) -> list[Step]:
        """Steps that change the weight of a module under a choice. Moving scales between modules is left out."""
        plan, row = self.question.plans[choice], self._rows[choice].get(name)
        steps = [] if plan is None or row is None else [plan.recipe.steps[number] for number in row.steps]
        return [_rough(step) for step in steps if step.definition.linear is not None]

    def _part(
        self,
        unit: int,
        prefix: str,
        names: Sequence[str],
        statistics: Mapping[str, Statistics],
        weighted: Mapping[str, Gram],
    ) -> _Part:
        """Apply every choice to the linears of a unit that lie in one block."""
        modules = [self.layout.by_name[prefix + name] for name in names]
        tensors = BlockTensors(self._cache.load, modules, prefix)
        weights = {name: tensors[f"{name}.weight"] for name in names}
        choices = range(len(self.question.plans))
        made = side_by_side(partial(self._compressed, prefix, weights, statistics), choices)
        for choice in choices if self._store is not None else ():
            for name in names if self.question.plans[choice] is not None else ():
                self._store(prefix + name, choice, made[choice][0][name])  # type: ignore[misc]
        errors = [
            sum(
                self._expected(prefix + name, weights[name] - done[name], weighted[name])
                if weighted
                else relative_error(weights[name], done[name], statistics[name][Gram].value)
                for name in names
            )
            for done, _ in made
        ]
        probe = min(choices, key=lambda choice: (not errors[choice], abs(choice - self.question.probe)))
        replaced = {
            f"{name}.weight": made[probe][0][name].T.contiguous() if module.transposed else made[probe][0][name]
            for name, module in zip(names, modules, strict=True)
        }
        return _Part(unit, errors, probe, replaced)

    def _compressed(
        self, prefix: str, weights: Mapping[str, Tensor], statistics: Mapping[str, Statistics], choice: int
    ) -> dict[str, Tensor]:
        """The linears of a unit under a choice; those that share their inputs in one call where the method allows."""
        done: dict[str, Tensor] = {}
        stacks: dict[object, list[str]] = {}
        for name in weights:
            steps = self._steps(choice, prefix + name)
            together = all(step.definition.row_wise(step.options) for step in steps)
            stacks.setdefault(id(statistics[name][Gram]) if together else name, []).append(name)
        for names in stacks.values():
            stacked = torch.cat([weights[name] for name in names])
            parts = tuple((name, len(weights[name])) for name in names)
            kept, result = None, None
            for step in self._steps(choice, prefix + names[0]):
                given = LinearInput(stacked, statistics[names[0]], kept, self._storage_dtype(choice), parts)
                result = factors.apply(partial(run_step, step), given, result)
                kept = result.kept if isinstance(result, Masked) else kept
                stacked = result.dense().float()
            done |= zip(names, stacked.split([rows for _, rows in parts]), strict=True)
        return done

    def _storage_dtype(self, choice: int) -> torch.dtype:
        plan = self.question.plans[choice]
        return torch.float32 if plan is None else plan.dtype

    def _expected(self, name: str, difference: Tensor, weighted: Gram) -> float:
        errors = output_errors(difference, weighted.value)
        return expected_kl(errors, self._gradients[name].outputs, self._seen)

    def _advance_probes(self, index: int, probe: Tensor, parts: Sequence[_Part]) -> None:
        """Run the block on every probe under way, start one per part, then run it on the dense states."""
        with self.stream.block(index, torch.float32) as block:
            for _, states in self._probes:
                self.stream.advance(block, index, states)
            for part in parts:
                with torch.no_grad():
                    outputs = [
                        self.stream.run_with(block, index, batch, part.replaced).clone() for batch in batches(probe)
                    ]
                part.replaced.clear()
                self._probes.append((part, torch.cat(outputs)))
            self.stream.advance(block, index, probe)

    def _measure_divergences(self, tokens: Tensor, dense: Tensor) -> None:
        """KL divergence of every probe from the dense model; losses of all choices follow."""
        measured = [Comparison() for _ in self._probes]
        with self.stream.head(torch.float32) as logits:
            for window in range(len(tokens)):
                self.progress("measure divergences", window, len(tokens), "")
                place, targets = slice(window, window + 1), tokens[window, 1:]
                reference = logits(dense[place])[:-1]
                for comparison, (_, states) in zip(measured, self._probes, strict=True):
                    comparison.update(logits(states[place])[:-1], targets, reference)
        for comparison, (part, _) in zip(measured, self._probes, strict=True):
            self._add(part.unit, extrapolated(comparison.result().kl or 0.0, part.probe, part.errors))
        self.progress("measure divergences", len(tokens), len(tokens), "")


def _rough(step: Step) -> Step:
    return step.model_copy(update={"options": step.definition.rough(step.options)})


def run_step(step: Step, given: LinearInput) -> Representation:
    """What a step of one linear makes of it."""
    return step.definition.linear(given, step.options)  # type: ignore[misc]
