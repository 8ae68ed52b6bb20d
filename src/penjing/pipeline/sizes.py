"""Sizes that only the model or the machine can tell become plain ones: `speedup` a number of parameters or of blocks.

What comes out is the recipe that is run and written beside the weights. It asks for the same model on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from penjing.errors import PlanError
from penjing.methods.base import Size
from penjing.methods.pruning.sizes import BlockOptions, TargetOptions, parse_count, sizes_of_depth
from penjing.models import layout_of
from penjing.models.layout import Layout
from penjing.models.shorter import shortened
from penjing.recipe import Recipe, Step, load_recipe

if TYPE_CHECKING:
    from penjing.engines.latency import StepTime

_POINTS = 9
"""Widths that are measured between the full one and the smallest; between them, times lie on straight lines."""

Times = Callable[[Sequence[Mapping[str, Any]]], "Sequence[StepTime]"]
"""Times of models by config.json, the full one first."""


@dataclass(frozen=True)
class Settled:
    """A recipe in which every size is a plain one, and for each that was not: what it became, and why."""

    recipe: Recipe
    notes: tuple[str, ...] = ()


def _times_here(configs: Sequence[Mapping[str, Any]]) -> Sequence[StepTime]:
    from penjing.engines.latency import step_times  # a plan that asks for no time does not wait for the engines

    return step_times(configs)


def settle(recipe: Recipe, config: Mapping[str, Any], layout: Layout, *, times: Times = _times_here) -> Settled:
    """Work out every `speedup`, and `sparsity` and `params` of steps that remove blocks.

    A speed-up is over the model that the step is given. Nothing is measured unless one is asked for and the table has
    no answer. Raises PlanError naming the best that can be reached when a size cannot.
    """
    steps, notes = list(recipe.steps), []
    waiting = [number for number, step in enumerate(steps) if _waits(step)]
    for number in range(waiting[-1] + 1 if waiting else 0):
        step = steps[number]
        if number in waiting:
            try:
                keys, note = _worked_out(step, config, layout, times)
            except ValueError as error:
                raise PlanError(f"{step.label}: {error}") from error
            own = {key: value for key, value in step.as_dict().items() if key not in _TARGETS}
            plain = load_recipe({"steps": [{**own, **keys}]}).steps[0]
            steps[number] = plain.model_copy(update={"position": step.position})
            notes.append(f"{step.label}: {note}")
        if number != waiting[-1]:
            config, layout = _after(steps[number], config, layout)
    return Settled(recipe.model_copy(update={"steps": tuple(steps)}), tuple(notes))


_TARGETS = BlockOptions.targets()
"""Keys of which a step has one."""


def _waits(step: Step) -> bool:
    """Whether only the model or the machine can tell what a step asks for."""
    options = step.options
    if isinstance(options, BlockOptions) and not options.drop:
        return True
    return isinstance(options, TargetOptions) and options.speedup is not None


def aimed(recipe: Recipe, **targets: float | str | None) -> Recipe:
    """The recipe with `sparsity`, `params` or `speedup` in the one step that says how much goes; None: not given.

    Raises PlanError when there are two targets, no step that takes the one, or several.
    """
    given = {key: value for key, value in targets.items() if value is not None}
    if not given:
        return recipe
    if len(given) > 1:
        words = " and ".join(f"{key} {value}" for key, value in given.items())
        raise PlanError(f"{words}: one step cannot meet two targets exactly; give one of them")
    ((key, value),) = given.items()
    able = [step for step in recipe.steps if key in type(step.options).model_fields and _says_how_much(step)]
    if len(able) > 1:
        named = ", ".join(step.label for step in able)
        raise PlanError(f"{key} {value}: several steps could meet it ({named}); write it into the recipe")
    if not able:
        raise PlanError(f"{key} {value}: {_why_none(recipe)}")
    chosen, others = able[0], {*_TARGETS, "pattern"}
    own = {name: keys for name, keys in chosen.as_dict().items() if name not in others}
    steps = [own | {key: value} if step is chosen else step.as_dict() for step in recipe.steps]
    return load_recipe(recipe.as_dict() | {"steps": steps})


def _says_how_much(step: Step) -> bool:
    return isinstance(step.options, TargetOptions) or "sparsity" in type(step.options).model_fields


def _why_none(recipe: Recipe) -> str:
    zeroing = next((step for step in recipe.steps if _says_how_much(step)), None)
    use = "use neurons, heads, channels, flap, llm-pruner, or a method that removes blocks"
    if zeroing is not None:
        return f"{zeroing.label} makes weights zero, and the model keeps its shape and its speed; {use}"
    return f"no step of the recipe removes anything; {use}, or `penjing allocate` for bits"


def _after(step: Step, config: Mapping[str, Any], layout: Layout) -> tuple[Mapping[str, Any], Layout]:
    """The model that a step leaves, as far as its config says; what is wrong with a step, its plan will say."""
    method = step.definition
    try:
        if method.remake is not None:
            config = method.remake.config(config, layout, step.options)
        elif method.select is not None:
            kept = layout.blocks - getattr(step.options, "drop", 0)
            config = shortened(config, layout.blocks, range(max(kept, 1)))
        elif method.rewrite is not None:
            config = {**config, **method.rewrite(layout, step.options).config}
        else:
            return config, layout
    except ValueError as error:
        raise PlanError(f"{step.label}: {error}") from error
    return config, layout_of(config)


def _worked_out(step: Step, config: Mapping[str, Any], layout: Layout, times: Times) -> tuple[Mapping[str, Any], str]:
    """The keys in place of what the step asks for, and a note."""
    options, remake = step.options, step.definition.remake
    assert isinstance(options, TargetOptions)
    if isinstance(options, BlockOptions):
        sizes, what = sizes_of_depth(config, layout), "blocks"
    elif remake is not None and remake.sizes is not None:
        sizes, what = list(remake.sizes(config, layout, options)), "units"
    else:
        raise ValueError("the method does not say which sizes a model can have")
    if options.speedup is not None:
        return _faster(options.speedup, sizes, what, config, layout, times)
    if options.params is not None:
        return _smaller(options.params, sizes)
    gone = int(layout.blocks * (options.sparsity or 0) + 1e-9)
    if not gone:
        raise ValueError(f"sparsity: {options.sparsity} of {layout.blocks} blocks is less than one block")
    return {"drop": gone}, f"sparsity {options.sparsity} is drop {gone} of {layout.blocks} blocks"


def _smaller(params: str | int, sizes: Sequence[Size]) -> tuple[Mapping[str, Any], str]:
    target = parse_count(params)
    if sizes[0].parameters <= target:
        raise ValueError(f"params: {params} asks for nothing: the model has {sizes[0].parameters:,} parameters")
    found = next((size for size in sizes if size.parameters <= target), None)
    if found is None:
        raise ValueError(
            f"params: {params} cannot be reached by removing blocks alone: one block and what is outside have "
            f"{sizes[-1].parameters:,} parameters"
        )
    return found.keys, f"params {params} is {_written(found)}, {found.parameters:,} parameters"


def _written(size: Size) -> str:
    return " ".join(f"{key} {value:,}" for key, value in size.keys.items())


def _faster(
    speedup: float, sizes: Sequence[Size], what: str, config: Mapping[str, Any], layout: Layout, times: Times
) -> tuple[Mapping[str, Any], str]:
    """The largest model that decodes so many times faster, by the table."""
    from penjing.engines.latency import machine_words

    seconds, before = _seconds(sizes, config, layout, times)
    fast = (place for place, one in enumerate(seconds) if before >= speedup * one and _sayable(sizes[place]))
    place = next(fast, None)
    if place is None:
        last = sizes[-1]
        raise ValueError(
            f"speedup: {speedup} cannot be reached by removing {what} alone: the smallest model that can be left, of "
            f"{last.parameters:,} parameters, decodes {before / seconds[-1]:.2f} times as fast on this machine"
        )
    found, after = sizes[place], seconds[place]
    return found.keys, (
        f"speedup {speedup} is {_written(found)}: a token takes {1e3 * after:.2f} ms instead of {1e3 * before:.2f} "
        f"({before / after:.3f} times as fast), measured on {machine_words()}"
    )


def _sayable(size: Size) -> bool:
    """Whether a config says so; its neighbours may be sayable where it is not."""
    try:
        size.config()
    except PlanError:
        return False
    return True


def _seconds(
    sizes: Sequence[Size], config: Mapping[str, Any], layout: Layout, times: Times
) -> tuple[list[float], float]:
    """Seconds for a token in every model of the list, and in the one that the step is given."""
    if sizes[-1].blocks < layout.blocks:
        (one,) = times([config])
        return [one.of(size.blocks) for size in sizes], one.of(layout.blocks)
    configs, parameters, points = [config], [], []
    for place in dict.fromkeys(round(at) for at in np.linspace(0, len(sizes) - 1, _POINTS)):
        if not _sayable(sizes[place]):
            continue
        parameters.append(sizes[place].parameters)
        if sizes[place].parameters == layout.parameters:  # the model itself, where the step changes no more than widths
            points.append(0)
        else:
            points.append(len(configs))
            configs.append(sizes[place].config())
    measured = [one.of(layout.blocks) for one in times(configs)]
    between = np.interp(
        [size.parameters for size in sizes], parameters[::-1], [measured[point] for point in reversed(points)]
    )
    return [float(value) for value in between], measured[0]
