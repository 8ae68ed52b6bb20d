"""Compressing the modules of one decoder block: statistics, then the recipe's steps in order, then the errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import repeat

import torch
from torch import Tensor, nn

from penjing.errors import CalibrationError, FormatError, VerificationError
from penjing.formats.base import input_tensors
from penjing.methods.base import BlockInput, BlockTask, Call, LinearFunction, LinearInput, Options, TransformFunction
from penjing.models import find
from penjing.models.layout import InputGroup, ModuleSpec, Residual
from penjing.numerics.activations import InputScale
from penjing.numerics.finite import all_finite
from penjing.numerics.observers import static_scale
from penjing.pipeline import factors
from penjing.pipeline.block_tensors import BlockTensors, relative_error
from penjing.pipeline.fold import fold, foldable, rescale_gradients
from penjing.pipeline.observe import CallRecorder, Observer
from penjing.pipeline.parallel import side_by_side
from penjing.pipeline.ranges import input_histograms
from penjing.planning import Plan, PlanRow
from penjing.recipe import Step
from penjing.representations import Dense, LowRank, Masked, Representation
from penjing.statistics import Statistics, StatisticType, StreamGap, compares, unseen, weighs


@dataclass
class ModuleResult:
    """What became of one module.

    packed      its tensors as they go into the file, by full name
    error       ||(W - W')X|| / ||WX|| over the calibration inputs ("output"), or ||W - W'|| / ||W|| ("weight"), where
                W' is what the packed tensors decode to
    tokens      calibration tokens it saw
    notes       what the report must say: damping raised, no token seen
    """

    module: ModuleSpec
    packed: dict[str, Tensor]
    error: float | None = None
    error_kind: str = ""
    tokens: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Lesson:
    """A block's inputs (S, T, D), the outputs (S, T, D) it should have, and how to run it with other parameters."""

    inputs: Tensor
    targets: Tensor
    run: Callable[[Tensor, Mapping[str, Tensor]], Tensor]


class BlockCompressor:
    """Applies a plan to one block. Names inside this class are relative to the block."""

    def __init__(
        self,
        plan: Plan,
        load: Callable[[str], Tensor],
        rows: Sequence[PlanRow],
        prefix: str,
        groups: Sequence[InputGroup],
        residual: Residual | None = None,
    ) -> None:
        self.plan = plan
        self.prefix = prefix
        self.rows = {row.module.name.removeprefix(prefix): row for row in rows}
        self.tensors = BlockTensors(load, [row.module for row in rows], prefix)
        self._groups, self._residual = groups, residual or Residual({}, ())
        self.statistics: dict[str, Statistics] = {}
        self.clusters: list[list[str]] = [[name] for name in self.rows]
        self.notes: dict[str, list[str]] = {name: [] for name in self.rows}
        self.done: dict[str, Representation] = {}
        self.input_scales: dict[str, InputScale] = {}
        self.output_grams: Mapping[str, Sequence[Tensor]] = {}

    def steps_of(self, name: str) -> list[Step]:
        """The recipe's steps that apply to a module."""
        return [self.plan.recipe.steps[number] for number in self.rows[name].steps]

    def needs(self) -> dict[str, list[StatisticType]]:
        """Module -> statistics that its steps want and that can be had.

        An expert's inputs cannot be compared with those in the dense model, where other tokens may reach it.
        """
        wanted = {}
        for name, row in self.rows.items():
            kinds = [kind for kind in self._wanted(name) if not (row.module.expert and compares(kind))]
            if kinds:
                wanted[name] = kinds
        return wanted

    def _wanted(self, name: str) -> list[StatisticType]:
        """Statistics that a module's steps ask for."""
        kinds = dict.fromkeys(kind for step in self.steps_of(name) for kind in step.definition.needs(step.options))
        if name not in self._residual.writers:
            kinds.pop(StreamGap, None)
        return list(kinds)

    def compares(self) -> bool:
        """Whether a step looks at the inputs in the dense model beside those in the compressed one."""
        return any(compares(kind) for kinds in self.needs().values() for kind in kinds)

    def observe(
        self,
        module: nn.Module,
        forwards: Iterable[Callable[[], object]],
        dense: Iterable[Callable[[], object]] | None = None,
        weights: Mapping[str, Tensor] | None = None,
        output_grams: Mapping[str, Sequence[Tensor]] | None = None,
    ) -> dict[str, list[Call]]:
        """Collect what the steps need while `forwards` (one call per batch) run the module.

        dense         the same batches with the dense model's hidden states; needed when `compares()`
        weights       how much each token counts, by the full name of the linear; None when all count alike
        output_grams  what `LinearInput` calls so, by names inside the block

        Returns the recorded calls of the submodules that a transform wants to search with.
        """
        needs = self.needs()
        searched = {group.inside for group in self.foldable_groups() if self._transforms(group)}
        recorder = CallRecorder(module, find, searched)
        own = {name: each for name in needs if (each := (weights or {}).get(self.prefix + name)) is not None}
        norms = self._residual.readers if any(StreamGap in kinds for kinds in needs.values()) else ()
        with Observer(module, find, needs, own, norms) as observer:
            for forward, again in zip(forwards, repeat(None) if dense is None else dense, strict=False):
                with observer.forward():
                    forward()
                if again is not None:
                    with observer.beside():
                        again()
        recorder.remove()
        self.output_grams = output_grams or {}
        self.statistics = dict(observer.statistics)
        self.clusters = [*observer.clusters(), *([name] for name in self.rows if name not in needs)]
        for name, kinds in needs.items():
            self._check_seen(name, kinds)
            if weights is not None and name not in own and any(map(weighs, kinds)):
                self.notes[name].append("its tokens count alike: not every token goes through it")
            if kinds != self._wanted(name):
                self.notes[name].append("keeps the outputs of its own inputs: in the dense model other tokens reach it")
        return recorder.calls

    def _check_seen(self, name: str, kinds: Sequence[StatisticType]) -> None:
        if name not in self.statistics:
            self.statistics[name] = unseen(kinds, self.rows[name].module.shape[1])
            self.notes[name].append("no calibration token reached it: treated as if its inputs were independent")
        for statistic in self.statistics[name].values():
            if not all_finite(statistic.value):
                raise CalibrationError(
                    f"the inputs of {self.prefix}{name} contain NaN or infinite values; the dense model overflows in "
                    "this dtype or an earlier block was damaged"
                )

    def foldable_groups(self) -> list[InputGroup]:
        """Groups whose scale can move into their source and whose linears all take part in the same steps."""
        modules = {name: row.module for name, row in self.rows.items()}
        groups = [group for group in self._groups if foldable(group, modules)]
        return [group for group in groups if len({self.rows[linear].steps for linear in group.linears}) == 1]

    def _why_not_foldable(self, name: str) -> str:
        group = next((group for group in self._groups if name in group.linears), None)
        if group is None or not foldable(group, {other: row.module for other, row in self.rows.items()}):
            return "no norm or linear before it can take the inverse"
        others = ", ".join(other for other in group.linears if other != name)
        return f"{others}, which share them, do not take part in the same steps"

    def _transforms(self, group: InputGroup) -> list[Step]:
        return [step for step in self.steps_of(group.linears[0]) if step.definition.transform is not None]

    def learns(self) -> bool:
        """Whether a step trains on the block's inputs and outputs."""
        return any(step.definition.learn is not None for name in self.rows for step in self.steps_of(name))

    def apply(self, module: nn.Module, calls: Mapping[str, list[Call]], lesson: Lesson | None) -> None:
        """All steps, in the recipe's order."""
        for number, step in enumerate(self.plan.recipe.steps):
            members = [name for name, row in self.rows.items() if number in row.steps]
            if not members:
                continue
            if step.definition.transform is not None:
                self._transform(step.definition.transform, step, module, calls, set(members))
            if step.definition.linear is not None:
                clusters = [[name for name in cluster if name in members] for cluster in self.clusters]
                self._compress(step.definition.linear, step, [cluster for cluster in clusters if cluster])
            if step.definition.learn is not None and lesson is not None:
                self.done |= step.definition.learn(self._task(members, lesson), step.options)

    def _task(self, members: Sequence[str], lesson: Lesson) -> BlockTask:
        masks = {name: self._kept(name) for name in members}
        return BlockTask(
            weights={name: self._current(name) for name in members},
            statistics=self.statistics,
            run=partial(self._run, lesson),
            inputs=lesson.inputs,
            targets=lesson.targets,
            kept={name: mask for name, mask in masks.items() if mask is not None},
            storage_dtype=self.plan.dtype,
        )

    def _run(self, lesson: Lesson, states: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """The block's output with `weights` in some linears and what earlier steps made of everything else."""
        parameters = self._parameters(weights)
        return lesson.run(states, {name: tensor.to(states.dtype) for name, tensor in parameters.items()})

    def _parameters(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters of the block that differ from the dense model's, as the live modules hold them."""
        changed = dict(self.tensors.changed)
        linears = {name: self._current(name) for name in self.rows if name in self.done or f"{name}.weight" in changed}
        for name, weight in {**linears, **weights}.items():
            changed[f"{name}.weight"] = weight.T if self.rows[name].module.transposed else weight
        return changed

    def measured(self) -> list[str]:
        """Linears whose inputs get a static scale."""
        found = ((name, row.scheme.activations) for name, row in self.rows.items())
        return [name for name, how in found if how is not None and not how.dynamic]

    def measure(self, module: nn.Module, forwards: Iterable[Callable[[], object]]) -> None:
        """Choose static scales for the inputs that `measured()` linears get while `forwards` run the module."""
        seen = input_histograms(module, self.measured(), forwards)
        for name in self.measured():
            if name not in seen or not math.isfinite(seen[name].largest):
                raise CalibrationError(
                    f"the calibration text gives {self.prefix}{name} no input, or one with NaN or infinite values, so "
                    "it can have no static scale; use `dynamic: true` for it"
                )
            chosen = next(step.activations for step in reversed(self.steps_of(name)) if step.activations)
            scale = static_scale(seen[name], chosen.chosen(), chosen.observer, chosen.percentile)
            self.input_scales[name] = scale

    def _transform(
        self,
        transform: TransformFunction,
        step: Step,
        module: nn.Module,
        calls: Mapping[str, list[Call]],
        members: set[str],
    ) -> None:
        groups = [group for group in self.foldable_groups() if members.issuperset(group.linears)]
        for name in sorted(members.difference(*(group.linears for group in groups))):
            self.notes[name].append(f"{step.method} cannot rescale its inputs: {self._why_not_foldable(name)}")
        given = BlockInput(module, groups, self.statistics, calls, self.plan.dtype)
        for group, scale in transform(given, step.options).items():
            fold(group, scale, self.tensors, self.plan.layout)
            rescale_gradients(self.output_grams.get(group.source or "", ()), scale)
            rescaled: set[int] = set()
            for statistic in (statistic for linear in group.linears for statistic in self.statistics[linear].values()):
                if id(statistic) not in rescaled:
                    statistic.rescale(scale)
                    rescaled.add(id(statistic))

    def _compress(self, linear: LinearFunction, step: Step, clusters: Sequence[Sequence[str]]) -> None:
        """Run a linear-level step; rows of linears that share an input go in one call when the method allows it."""
        together = step.definition.row_wise(step.options)
        products = any(isinstance(weight, LowRank) for weight in self.done.values())
        if not together or products:
            clusters = [[name] for cluster in clusters for name in cluster]
        done = side_by_side(lambda names: self._run_linear(linear, step.options, names), clusters, self._cost)
        for names, (result, warned) in zip(clusters, done, strict=True):
            start = 0
            for name in names:
                rows = self.rows[name].module.shape[0]
                self.done[name] = result.rows(start, start + rows)
                self.notes[name] += warned
                start += rows

    def _cost(self, names: Sequence[str]) -> float:
        """Of a method on some linears with the same inputs: most are cubic in these, and linear in outputs."""
        shapes = [self.rows[name].module.shape for name in names]
        inputs = shapes[0][1]
        return inputs**2 * (inputs + sum(outputs for outputs, _ in shapes))

    def _run_linear(self, linear: LinearFunction, options: Options, names: Sequence[str]) -> Representation:
        def run(given: LinearInput) -> Representation:
            return linear(given, options.for_matrix(tuple(given.weight.shape), given.storage_dtype))

        return factors.apply(run, self._linear_input(names), self.done.get(names[0]))

    def _linear_input(self, names: Sequence[str]) -> LinearInput:
        weights = [self._current(name) for name in names]
        masks = [self._kept(name) for name in names]
        kept = None
        if any(mask is not None for mask in masks):
            kept = torch.cat([_all_kept(mask, weight) for mask, weight in zip(masks, weights, strict=True)])
        return LinearInput(
            weight=torch.cat(weights) if len(weights) > 1 else weights[0],
            statistics=self.statistics.get(names[0], {}),
            kept=kept,
            storage_dtype=self.plan.dtype,
            parts=tuple((name, len(weight)) for name, weight in zip(names, weights, strict=True)),
            output_grams=self._output_grams(names),
        )

    def _output_grams(self, names: Sequence[str]) -> tuple[Tensor, ...]:
        """Of the stacked outputs of some linears; none unless it is known of all."""
        known = [self.output_grams.get(name, ()) for name in names]
        return tuple(gram for grams in known for gram in grams) if all(known) else ()

    def _current(self, name: str) -> Tensor:
        return self.done[name].dense().float() if name in self.done else self.tensors[f"{name}.weight"]

    def _kept(self, name: str) -> Tensor | None:
        now = self.done.get(name)
        if now is None and self.rows[name].given.sparsity:
            now = self._given(name)
        return now.kept if isinstance(now, Masked) else None

    def _given(self, name: str) -> Dense | Masked:
        """The weight before the recipe's steps; what an earlier walk pruned is zero in it."""
        values = Dense(self.tensors[f"{name}.weight"])
        return Masked(values, values.values != 0) if self.rows[name].given.sparsity else values

    def finish(
        self,
        module: nn.Module,
        calls: Mapping[str, list[Call]],
        lesson: Lesson | None = None,
        replay: Callable[[Mapping[str, Tensor]], Iterable[Callable[[], object]]] | None = None,
    ) -> list[ModuleResult]:
        """Apply all steps: every module, compressed or copied, with its error. Steps that learn need a `lesson`.

        replay  the forward passes of `observe` again, with other values for some parameters; where it is given, static
                scales are chosen from the inputs that linears get once all steps are done
        """
        self.apply(module, calls, lesson)
        if replay is not None and self.measured():
            self.measure(module, replay(self._parameters({})))
        results = [self._result(name, row) for name, row in self.rows.items()]
        for name, tensor in ((name, tensor) for result in results for name, tensor in result.packed.items()):
            if tensor.itemsize > 1 and not all_finite(tensor):
                raise FormatError(
                    f"{name} does not fit {self.plan.dtype}: values overflow; set `dtype: bfloat16` in the recipe"
                )
        return results

    def _result(self, name: str, row: PlanRow) -> ModuleResult:
        module = row.module
        weight = f"{name}.weight"
        copied = name not in self.done and row.scheme.dense and weight not in self.tensors.changed
        parts = dict(zip(module.tensors, module.tensor_names(), strict=True))
        packed = {
            full: self._plain(full.removeprefix(self.prefix)).to(self.plan.dtype_of(module.tensors[key]))
            for key, full in parts.items()
            if key != "weight" or copied
        }
        if "weight" not in parts or copied:
            return ModuleResult(module, packed, notes=self.notes[name])
        coded, unpacked = self._pack(row, self.done.get(name) or self._given(name))
        packed |= coded
        if name in self.input_scales:
            packed |= input_tensors(module, self.input_scales[name])
        result = ModuleResult(module, packed, notes=self.notes[name])
        if name in self.done:
            written, original = unpacked.dense().float(), self.tensors[weight]
            result.error, result.error_kind = relative_error(original, written, self.statistics.get(name))
        seen = self.statistics.get(name)
        result.tokens = next(iter(seen.values())).tokens if seen else 0
        return result

    def _plain(self, name: str) -> Tensor:
        """A tensor that is written as it is; without a detour over fp32 where no step has changed it."""
        return self.tensors[name] if name in self.tensors.changed else self.tensors.as_stored(name)

    def _pack(self, row: PlanRow, weight: Representation) -> tuple[dict[str, Tensor], Representation]:
        """The weight's tensors for the file and what they unpack to: bit for bit what the method returned."""
        target, dtype = self.plan.format_of(row), self.plan.dtype_of(row.module.tensors["weight"])
        packed = target.pack(row.module, row.scheme, weight, dtype)
        unpacked = target.unpack(row.module, row.scheme, packed.__getitem__)
        if not torch.equal(target.decode(unpacked, dtype), target.decode(weight, dtype)):
            raise VerificationError(f"format {target.name}: {row.module.name} does not decode to what was packed")
        return packed, unpacked


def _all_kept(mask: Tensor | None, weight: Tensor) -> Tensor:
    return torch.ones(weight.shape, dtype=torch.bool) if mask is None else mask
