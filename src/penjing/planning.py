"""A recipe resolved against a model: which tensor gets which step, what it becomes, how many bytes it takes.

Nothing here reads a weight. Every reason to refuse a job is found here, before the long work starts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch

from penjing.checkpoint.base import Checkpoint
from penjing.costs import compares, model_training, operations, peak_memory, there_and_back
from penjing.errors import MissingDependency, PlanError
from penjing.formats import FORMATS, Format, format_of
from penjing.formats.base import OneFile, WithGraph
from penjing.methods.base import Rewriting
from penjing.methods.pruning.cut import SizeOptions
from penjing.methods.training import TrainOptions
from penjing.mixes import written_out
from penjing.models import layout_of
from penjing.models.layout import Layout, ModuleSpec
from penjing.models.shorter import shortened
from penjing.numerics.precision import compute_dtype, matmul_rate
from penjing.recipe import Recipe, Step
from penjing.representations import Scheme
from penjing.rules import (
    blocks_to_drop,
    check_fused,
    check_kind,
    check_remake,
    check_sharing,
    check_step,
    describe,
    pattern_problems,
)
from penjing.targets import selected

DENSE = Scheme()

Given = dict[str, Scheme]
"""What a walk finds pruned already, by the module's name."""


@dataclass(frozen=True)
class PlanRow:
    """One module: what happens to it and what it will weigh.

    steps         numbers (from 0) of the recipe's steps that apply
    given         what the weight was before them: pruned, or dense
    source_bytes  its tensors as they would be written untouched in the storage dtype
    bytes         its tensors as they will be written
    note          why a step that asked for it leaves it as it is; empty otherwise
    remark        what it gets instead of what the step says, and why; empty otherwise
    """

    module: ModuleSpec
    steps: tuple[int, ...]
    scheme: Scheme
    source_bytes: int
    bytes: int
    note: str = ""
    given: Scheme = DENSE
    remark: str = ""


@dataclass(frozen=True)
class Plan:
    """The resolved job, or one walk of it. `rows` speak of the model before blocks are removed.

    recipe     with mixes of types written out, a step per type
    told       the recipe as it was given
    layout     of the model that is walked, which is the rewritten one when the recipe rewrites it
    memory     what is in memory at the worst moment of the walk, in bytes, by part
    seconds    forward passes and statistics at the speed of matrix products measured on this machine; what the methods
               themselves do, verification and evaluation come on top
    rewriting  the tensors that another model of the same function has instead; None when the recipe asks for none
    before     the plan of the walk over the model that this one's model is made from; None for the first
    """

    label: str
    recipe: Recipe
    told: Recipe
    layout: Layout
    dtype: torch.dtype
    rows: tuple[PlanRow, ...]
    drop: int
    warnings: tuple[str, ...]
    memory: Mapping[str, int]
    seconds: float
    rewriting: Rewriting | None = None
    before: Plan | None = None

    @property
    def walks(self) -> tuple[Plan, ...]:
        """The plans of all walks, in order; the last is this one."""
        return (*(self.before.walks if self.before else ()), self)

    @property
    def format(self) -> Format:
        return FORMATS[self.recipe.format]

    def format_of(self, row: PlanRow) -> Format:
        """What writes a module: plain tensors where nothing is done to it, in every format."""
        return FORMATS["dense"] if row.scheme.dense else self.format

    def dtype_of(self, shape: tuple[int, ...]) -> torch.dtype:
        """The dtype in which a tensor that lies on no grid is written."""
        return self.format.vector_dtype if isinstance(self.format, OneFile) and len(shape) == 1 else self.dtype

    @property
    def source_bytes(self) -> int:
        """Bytes of the original dense model in the storage dtype."""
        return sum(row.source_bytes for row in self.walks[0].rows)

    @property
    def bytes(self) -> int:
        """Predicted bytes of all tensors written. Removed blocks are counted as blocks of mean size."""
        outside = sum(row.bytes for row in self.rows if row.module.block is None)
        blocks = sum(row.bytes for row in self.rows if row.module.block is not None)
        return outside + blocks * (self.layout.blocks - self.drop) // max(self.layout.blocks, 1)

    @property
    def peak_memory(self) -> int:
        """Predicted peak in bytes of all walks, above what importing torch and transformers takes."""
        return max(sum(walk.memory.values()) for walk in self.walks)

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the totals and one entry per module."""
        return {
            "model": self.label,
            "format": self.recipe.format,
            "dtype": str(self.dtype).removeprefix("torch."),
            "blocks": self.layout.blocks,
            "blocks_removed": self.drop,
            "models": [
                {"parameters": walk.layout.parameters, "steps": [step.method for step in walk.recipe.steps]}
                for walk in self.walks
            ],
            "parameters": self.layout.parameters,
            "dense_bytes": self.source_bytes,
            "predicted_bytes": self.bytes,
            "predicted_peak_memory": dict(self.memory),
            "predicted_seconds": round(sum(walk.seconds for walk in self.walks), 1),
            "warnings": list(self.warnings),
            "modules": [
                {
                    "name": row.module.name,
                    "shape": list(row.module.shape) if "weight" in row.module.tensors else None,
                    "steps": [self.recipe.steps[step].method for step in row.steps],
                    "scheme": describe(row.scheme),
                    "bytes": row.bytes,
                    "note": row.note or row.remark,
                }
                for row in self.rows
            ],
        }


def make_plan(checkpoint: Checkpoint, layout: Layout, recipe: Recipe, *, trust_remote_code: bool = False) -> Plan:
    """Resolve `recipe` for a model. Raises PlanError naming module, rule and fix; reads no weight."""
    if format_of(checkpoint.config).name != "dense":
        raise PlanError(
            f"{checkpoint.label} is already compressed ({format_of(checkpoint.config).name}); "
            "start from the dense model"
        )
    check_kind(layout, recipe)
    config: Mapping[str, Any] = checkpoint.config
    plan, given = None, Given()
    for stage in recipe.stages():
        if stage.remake is not None:
            check_remake(layout, stage.remake)
        part = recipe.model_copy(update={"steps": stage.steps} | ({"format": "dense"} if stage.remake else {}))
        walk = plan_walk(checkpoint.label, config, layout, part, given)
        plan = replace(walk, before=plan, warnings=(*(plan.warnings if plan else ()), *walk.warnings))
        if stage.remake is None:
            break
        plan = _with_training(plan, stage.remake)
        before = config
        config, given = _remade(plan, config, stage.remake)
        if isinstance(stage.remake.options, SizeOptions) and config == before:
            words = "the amount, rounded to whole units and to `multiple`, is what the model has"
            plan = replace(plan, warnings=(*plan.warnings, f"{stage.remake.label} removes nothing: {words}"))
        layout = layout_of(config, trust_remote_code=trust_remote_code)
    assert plan is not None  # a recipe's stages end with one that makes no other model
    if isinstance(plan.format, OneFile):
        _refuse(plan.format.companion_problems(checkpoint), checkpoint.label, plan.format.name)
    return plan


def _refuse(reasons: Sequence[str], label: str, name: str) -> None:
    if reasons:
        raise PlanError(f"format {name} cannot hold {label}: {'; '.join(reasons)}")


def _with_training(plan: Plan, step: Step) -> Plan:
    """The plan of a walk with what the training, or the pass there and back, after it needs."""
    remake = step.definition.remake
    assert remake is not None
    if isinstance(step.options, TrainOptions):
        memory, work = model_training(step.options, plan.recipe, plan.layout)
    elif remake.backward(step.options):
        memory, work = there_and_back(plan.recipe, plan.layout)
    else:
        return plan
    larger = max(plan.memory, memory, key=lambda moment: sum(moment.values()))
    return replace(plan, memory=larger, seconds=plan.seconds + work / matmul_rate(compute_dtype()))


def _remade(plan: Plan, config: Mapping[str, Any], step: Step) -> tuple[Mapping[str, Any], Given]:
    """The config of the model that a step makes of a walked one, and which of its weights are known to be pruned."""
    coded = next((row for row in plan.rows if row.scheme.grid or row.scheme.activations), None)
    if coded is not None:
        raise PlanError(
            f"{step.method} makes another dense model, but a step before it turns {coded.module.name} into "
            f"{describe(coded.scheme)}; quantise after it"
        )
    if plan.rewriting is not None:
        config = {**config, **plan.rewriting.config}
    if plan.drop:
        config = shortened(config, plan.layout.blocks, range(plan.layout.blocks - plan.drop))
    layout = layout_of(config)
    remake = step.definition.remake
    assert remake is not None
    try:
        made = remake.config(config, layout, step.options)
    except ValueError as error:
        raise PlanError(f"{step.method}: {error}") from error
    zeros = {row.module.name: row.scheme for row in plan.rows if row.scheme.sparsity}
    if not remake.keeps_zeros(step.options):
        zeros = {}
    for name, scheme in remake.prunes(layout_of(made), step.options).items():
        before = zeros.get(name, DENSE)
        zeros[name] = replace(scheme, sparsity=max(scheme.sparsity, before.sparsity))
    return made, zeros


def plan_walk(label: str, config: Mapping[str, Any], layout: Layout, recipe: Recipe, given: Given) -> Plan:
    """The plan of the steps that share one walk over a model. Raises PlanError."""
    if given and any(step.definition.select for step in recipe.steps):
        raise PlanError("blocks are removed from a model that an earlier step pruned; remove them before pruning")
    dtype = storage_dtype(config, recipe)
    tied = layout.tied
    target = FORMATS[recipe.format]
    check_sharing(layout, recipe, target)
    if (rewriting := _rewriting(recipe, layout)) is not None:
        layout = rewriting.layout
    if isinstance(target, OneFile | WithGraph):
        final = config if rewriting is None else {**config, **rewriting.config}
        _refuse(target.refusals(layout, final), label, target.name)
    told, recipe = recipe, written_out(recipe, layout)
    assigned = _assign(recipe, layout)
    rows = [
        _resolve(module, assigned.get(module.name, ()), recipe, target, dtype, _given(module, given))
        for module in layout.modules
    ]
    weights = {row.module: row.scheme for row in rows if "weight" in row.module.tensors}
    if conflicts := target.conflicts(weights):
        raise PlanError(f"format {target.name} cannot hold this mix: {'; '.join(conflicts)}")
    check_fused(layout, {row.module.name: row.scheme for row in rows}, target)
    warnings = [
        f"{row.module.name}{' stays dense' if row.scheme.dense else ''}: {row.note}" for row in rows if row.note
    ]
    remarks = Counter(row.remark for row in rows if row.remark)
    warnings += [f"{count} module{'s' if count > 1 else ''}: {remark}" for remark, count in remarks.items()]
    warnings += rewriting.notes if rewriting else ()
    warnings += recipe.cautions(layout.parameters)
    if tied and not layout.tied:
        rows = [replace(row, source_bytes=0) if row.module.kind == "head" else row for row in rows]
        warnings += [
            f"{row.module.name} is no longer tied to the embedding: {row.bytes:,} bytes more"
            for row in rows
            if row.module.kind == "head"
        ]
    return Plan(
        label=label,
        recipe=recipe,
        told=told,
        layout=layout,
        dtype=dtype,
        rows=tuple(rows),
        drop=blocks_to_drop(recipe, layout),
        warnings=tuple(warnings),
        memory=peak_memory(recipe, layout),
        seconds=operations(recipe, [(row.module, row.steps) for row in rows]) / matmul_rate(compute_dtype()),
        rewriting=rewriting,
    )


def _given(module: ModuleSpec, given: Given) -> Scheme:
    """What the module's weight is before the walk; one that computes with another's has nothing to be pruned."""
    return DENSE if module.owner else given.get(module.name, DENSE)


def _rewriting(recipe: Recipe, layout: Layout) -> Rewriting | None:
    """What the recipe's rewriting step asks for. `_assign` sees to it that there is one at most, before all others."""
    wanted = (step.definition.rewrite(layout, step.options) for step in recipe.steps if step.definition.rewrite)
    return next(wanted, None)


def storage_dtype(config: Mapping[str, Any], recipe: Recipe) -> torch.dtype:
    """The dtype of dense tensors and scales on disk."""
    name = recipe.dtype
    if name == "auto":
        name = config.get("dtype") or config.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise PlanError(f"the model's dtype {name!r} cannot be written; set `dtype: bfloat16` in the recipe")
    return dtype


def _assign(recipe: Recipe, layout: Layout) -> dict[str, list[int]]:
    """Module name -> numbers of the steps that apply to it, in order."""
    assigned: dict[str, list[int]] = {}
    changed = False
    for number, step in enumerate(recipe.steps):
        if step.definition.select is not None:
            if changed:
                raise PlanError(
                    f"{step.label} removes blocks but comes after a step that changes weights; "
                    "move it before them, so that its scores are those of the model that is cut"
                )
            continue
        if step.definition.rewrite is not None and changed:
            raise PlanError(
                f"{step.label} rewrites the whole model but comes after a step that changes "
                "weights; make it the first step, or the first after those that remove blocks"
            )
        if compares(step) and recipe.propagate == "original":
            raise PlanError(
                f"{step.label}: the method compares the compressed model's inputs with the dense "
                "model's, and with `propagate: original` they are the same; drop `propagate` or `asymmetric`"
            )
        changed = True
        if step.definition.on_model:
            continue
        for name in selected(step, layout):
            assigned.setdefault(name, []).append(number)
    return assigned


def _resolve(
    module: ModuleSpec, steps: Iterable[int], recipe: Recipe, target: Format, dtype: torch.dtype, given: Scheme
) -> PlanRow:
    """The row of one module: fold its steps into a scheme and ask the format whether it can hold it."""
    plain = target.nbytes(module, DENSE, dtype)
    scheme, applied, notes = given, list[int](), list[str]()
    for number in steps:
        step = recipe.steps[number]
        try:
            options = step.options.for_matrix(module.shape, dtype)
            if reason := options.declines(module.shape):
                notes.append(f"{step.method}: {reason}")
                continue
            check_step(module, scheme, step, [recipe.steps[other] for other in applied])
            scheme = options.scheme(scheme, dtype)
        except ValueError as error:
            raise PlanError(f"{step.label} on {module.name}: {error}") from error
        applied.append(number)
        if step.activations:
            scheme = replace(scheme, activations=step.activations.chosen())
    problems = [] if scheme.dense else [*pattern_problems(module, scheme), *target.problems(module, scheme)]
    if problems:
        if recipe.on_unsupported == "error":
            raise PlanError(
                f"format {target.name} cannot hold {module.name} as {describe(scheme)}: {'; '.join(problems)}"
                + _holders(module, scheme)
            )
        return PlanRow(module, (), DENSE, plain, plain, "; ".join([*notes, *problems]), given)
    found = [recipe.steps[number].options.remark(module.shape) for number in applied]
    remark, size = "; ".join(text for text in found if text), target.nbytes(module, scheme, dtype)
    return PlanRow(module, tuple(applied), scheme, plain, size, "; ".join(notes), given, remark)


def _holders(module: ModuleSpec, scheme: Scheme) -> str:
    """The end of a refusal: formats whose library is here and that have a place for such a module."""
    able = []
    for name, other in FORMATS.items():
        with suppress(MissingDependency):
            able += [] if other.problems(module, scheme) else [name]
    return f". Formats that can: {', '.join(able)}" if able and not pattern_problems(module, scheme) else ""
