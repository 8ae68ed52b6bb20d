"""What may become of each unit of a model, and what it weighs: a plan per choice, recipes from mixtures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import permutations
from typing import Any

from penjing.checkpoint.base import Checkpoint
from penjing.errors import PlanError, RecipeError
from penjing.models.layout import Layout, ModuleSpec
from penjing.pipeline.choices import Choice
from penjing.pipeline.patterns import patterns
from penjing.planning import Plan, make_plan
from penjing.recipe import Recipe, Step, load_recipe
from penjing.representations import Scheme
from penjing.targets import selected


@dataclass(frozen=True)
class Menu:
    """Units and choices of a model.

    whole    the plan of the recipe as it is
    choices  for a unit
    drops    whether a whole block may go instead
    units    linears of the decoder blocks by full name; those that must share a choice together
    varied   numbers of the recipe's steps that the choices replace
    plans    per choice, the model with that choice in every unit; None: everything stays as it is
    sizes    bytes by unit and choice
    fixed    bytes of everything outside the units
    config   config.json of the model
    """

    whole: Plan
    choices: tuple[Choice, ...]
    drops: bool
    varied: tuple[int, ...]
    units: tuple[tuple[str, ...], ...]
    plans: tuple[Plan | None, ...]
    sizes: tuple[tuple[int, ...], ...]
    fixed: int
    config: Mapping[str, Any]

    @classmethod
    def open(cls, checkpoint: Checkpoint, layout: Layout, recipe: Recipe, choices: Sequence[Choice]) -> Menu:
        """Plan every choice.

        Raises PlanError for a recipe without bits to choose, for fewer than two choices, and for a choice or a mixture
        of choices that the format cannot hold.
        """
        if len(choices) < 2:
            raise PlanError("there is nothing to choose: give two or more choices, such as 2,3,4,6,8")
        drops, choices = any(one.drops for one in choices), [one for one in choices if not one.drops]
        whole = make_plan(checkpoint, layout, recipe)
        if whole.drop or whole.before is not None:
            raise PlanError(
                "a recipe that removes blocks or makes another model cannot be allocated; do that in a run of its own, "
                "first"
            )
        inside = whole.layout
        varied = _varied(recipe, inside, choices)
        names = [name for number in varied for name in _in_blocks(recipe.steps[number], inside)]
        least = cls(whole, tuple(choices), drops, varied, (tuple(names),), (), (), 0, checkpoint.config)
        plans = []
        for choice in choices:
            wanted = least._assemble(dict.fromkeys(names, choice))
            plans.append(None if wanted is None else make_plan(checkpoint, layout, wanted))
        rows = [{row.module.name: row for row in (plan or whole).rows} for plan in plans]
        units = _units(inside, names, whole, [_schemes(plan) for plan in plans])
        if drops and any(len({inside.by_name[name].block for name in unit}) > 1 for unit in units):
            raise PlanError(
                f"`drop` is no choice here: in format {recipe.format} the experts of all blocks share one choice; use "
                "format native"
            )
        sizes = tuple(
            tuple(
                sum(by_name[name].source_bytes if plan is None else by_name[name].bytes for name in unit)
                for plan, by_name in zip(plans, rows, strict=True)
            )
            for unit in units
        )
        fixed = whole.bytes - sum(row.bytes for row in whole.rows if row.module.name in set(names))
        return cls(whole, tuple(choices), drops, varied, units, tuple(plans), sizes, fixed, checkpoint.config)

    @property
    def layout(self) -> Layout:
        """Of the model that is walked."""
        return self.whole.layout

    @property
    def recipe(self) -> Recipe:
        """With the bits it came with."""
        return self.whole.recipe

    @property
    def totals(self) -> tuple[int, ...]:
        """Bytes of the whole model with one choice everywhere."""
        return tuple(self.fixed + sum(sizes) for sizes in zip(*self.sizes, strict=True))

    @property
    def weights(self) -> int:
        """Parameters of the units."""
        return sum(self.layout.by_name[name].parameters for unit in self.units for name in unit)

    def assemble(self, chosen: Sequence[int], gone: Sequence[int] = ()) -> Recipe | None:
        """The recipe that gives every unit its choice, without the blocks `gone`; None when it has nothing to do."""
        return self._assemble(
            {name: self.choices[option] for unit, option in zip(self.units, chosen, strict=True) for name in unit}, gone
        )

    def _assemble(self, assignment: Mapping[str, Choice], gone: Sequence[int] = ()) -> Recipe | None:
        steps: list[dict[str, Any]] = []
        if gone:
            steps.append({"method": "named-blocks", "blocks": list(gone)})
        for number, step in enumerate(self.recipe.steps):
            if step.definition.on_model or (number not in self.varied and not gone):
                steps.append(step.as_dict())
                continue
            names = [name for name in selected(step, self.layout) if self.layout.by_name[name].block not in gone]
            outside = [name for name in names if number not in self.varied or name not in assignment]
            if outside:
                keys = {"targets": self._targets(outside, gone) if gone else outside, "ignore": []}
                steps.append(step.as_dict() | keys)
            for choice in self.choices if number in self.varied else ():
                members = [name for name in names if assignment.get(name) == choice]
                if members and not choice.dense:
                    steps.append(self._step(step, choice, members, gone))
        if not steps:
            return None
        try:
            return load_recipe(self.recipe.as_dict() | {"steps": steps})
        except RecipeError as error:
            raise PlanError(f"a choice does not suit the recipe: {error}") from error

    def _targets(self, names: Sequence[str], gone: Sequence[int]) -> list[str]:
        """What a step applies to, in the numbers that blocks have when some are gone."""
        return targets_for(self.layout, names, partial(_renumbered, self.layout, gone))

    def _step(self, step: Step, choice: Choice, names: Sequence[str], gone: Sequence[int]) -> dict[str, Any]:
        keys = choice.step(step)
        if step.activations is not None and keys["method"] != step.method:
            keys |= {"activations": step.as_dict()["activations"]}
        return keys | {"targets": self._targets(names, gone), "ignore": []}


def _renumbered(layout: Layout, gone: Sequence[int], name: str) -> str | None:
    """The name of a module in the model without some blocks; None: it went with its block."""
    index = layout.by_name[name].block
    if index is None:
        return name
    if index in gone:
        return None
    before = layout.block_name(index)
    return layout.block_name(index - sum(other < index for other in gone)) + name.removeprefix(before)


def targets_for(
    layout: Layout, names: Sequence[str], renamed: Callable[[str], str | None] = lambda name: name
) -> list[str]:
    """The `targets` of a step that applies to these modules and to no others.

    renamed  what a module is called in the model that the step is applied to; None where it is not there
    """
    chosen = set(names)
    others = [
        module.name
        for module in layout.modules
        if module.name not in chosen
        and (module.kind in ("linear", "embedding", "head") or module.name in (layout.never or {}))
    ]
    here, elsewhere = ([new for name in group if (new := renamed(name)) is not None] for group in (names, others))
    return patterns(here, elsewhere)


def _varied(recipe: Recipe, layout: Layout, choices: Sequence[Choice]) -> tuple[int, ...]:
    """Numbers of the steps that the choices replace: those with bits, or else those with a sparsity."""
    for key in ("bits", "sparsity"):
        found = tuple(number for number, step in enumerate(recipe.steps) if _has(key, step, layout))
        if found and (key == "bits" or not all(choice.step_of_bits for choice in choices)):
            return found
    raise PlanError("no step of the recipe has `bits` to choose for linears of the blocks; use rtn or gptq")


def _has(key: str, step: Step, layout: Layout) -> bool:
    if step.definition.select or getattr(step.options, key, None) is None:
        return False
    if not _in_blocks(step, layout):
        return False
    if step.definition.linear is None:
        raise PlanError(
            f"{step.label} learns whole blocks, so the loss of one linear cannot be measured; "
            "allocate with gptq in its place and change the method in the recipe that comes out"
        )
    return True


def _in_blocks(step: Step, layout: Layout) -> list[str]:
    return [name for name in selected(step, layout) if layout.by_name[name].block is not None]


def _schemes(plan: Plan | None) -> dict[str, Scheme]:
    return {} if plan is None else {row.module.name: row.scheme for row in plan.rows}


def _units(
    layout: Layout, names: Sequence[str], plan: Plan, schemes: Sequence[Mapping[str, Scheme]]
) -> tuple[tuple[str, ...], ...]:
    """Linears that share a choice: fused ones, experts of one kind; all experts where the format wants it so."""
    conflicts: list[str] = []
    for experts_together in (False, True):
        units = _gather(layout, names, experts_together)
        conflicts = _conflicts(layout, units, plan, schemes)
        if not conflicts:
            return units
    raise PlanError(f"format {plan.format.name} cannot hold a mixture of these choices: {'; '.join(conflicts)}")


def _gather(layout: Layout, names: Sequence[str], experts_together: bool) -> tuple[tuple[str, ...], ...]:
    key: dict[str, str] = {}
    for index, groups in enumerate(layout.groups):
        for group in groups:
            full = [f"{layout.block_name(index)}.{linear}" for linear in group.linears]
            key |= dict.fromkeys(full, full[0]) if group.fused else {}
    units: dict[str, list[str]] = {}
    for name in names:
        leader = key.get(name, name)
        before, expert, after = leader.partition(".experts.")
        if expert:
            leader = "experts" if experts_together else f"{before}.experts.{after.partition('.')[2]}"
        units.setdefault(leader, []).append(name)
    return tuple(map(tuple, units.values()))


def _conflicts(
    layout: Layout, units: Sequence[Sequence[str]], plan: Plan, schemes: Sequence[Mapping[str, Scheme]]
) -> list[str]:
    """What the format says to mixtures: every pair of choices, each for every other unit."""
    modules: list[ModuleSpec] = [module for module in layout.modules if "weight" in module.tensors]
    rest = {row.module.name: row.scheme for row in plan.rows}
    owner = {name: number for number, unit in enumerate(units) for name in unit}
    for pair in permutations(schemes, 2):
        mixed = {
            module: pair[owner[module.name] % 2].get(module.name, Scheme())
            if module.name in owner
            else rest[module.name]
            for module in modules
        }
        if problems := plan.format.conflicts(mixed):
            return problems
    return []
