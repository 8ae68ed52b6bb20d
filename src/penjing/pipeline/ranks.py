"""Ranks for every linear, from spectra measured in one walk over the dense model: an ordinary recipe comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
import yaml
from torch import Tensor

from penjing.checkpoint.base import Checkpoint
from penjing.errors import PlanError
from penjing.methods.low_rank.options import RankOptions
from penjing.methods.low_rank.ranks import Spectrum, by_budget, by_energy, spectrum
from penjing.models import find
from penjing.models.layout import Layout
from penjing.numerics.precision import compute_dtype
from penjing.pipeline.cache import BlockCache
from penjing.pipeline.observe import EnoughSeen, Observer
from penjing.pipeline.patterns import patterns
from penjing.pipeline.sensitivity import unseen
from penjing.pipeline.stream import StreamedModel, batches
from penjing.pipeline.text import TextSource
from penjing.pipeline.weights import Weights
from penjing.planning import Plan, make_plan
from penjing.recipe import Recipe, Step, load_recipe
from penjing.statistics import Gram
from penjing.targets import selected

Progress = Callable[[str, int, int, str], None]


@dataclass(frozen=True)
class Ranks:
    """The recipe that came out, and why.

    recipe      ordinary, ready for `compress`
    plan        what it will do
    chosen      unit -> its rank; None: dense. A unit is a linear, or all experts of one kind in a block
    spectra     unit -> what ranks lose
    parameters  of all units as they were, and with the ranks chosen
    """

    recipe: Recipe
    plan: Plan
    chosen: Mapping[str, int | None]
    spectra: Mapping[str, Spectrum]
    parameters: tuple[int, int]

    @property
    def loss(self) -> float:
        """Share of the squared output left out, summed over linears."""
        return sum(self.spectra[unit].loss(rank) for unit, rank in self.chosen.items())

    def recipe_text(self) -> str:
        """The recipe in YAML."""
        return yaml.safe_dump(self.recipe.as_dict(), sort_keys=False)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.plan.label,
            "parameters": self.parameters[0],
            "parameters_kept": self.parameters[1],
            "predicted_bytes": self.plan.bytes,
            "loss": self.loss,
            "ranks": dict(self.chosen),
            "recipe": self.recipe.as_dict(),
        }


def choose_ranks(
    checkpoint: Checkpoint,
    layout: Layout,
    recipe: Recipe,
    *,
    ratio: float | None,
    energy: float | None,
    progress: Progress,
    trust_remote_code: bool = False,
) -> Ranks:
    """Measure, choose, and write the recipe, in which the first step of low rank becomes one per rank.

    ratio   parameters of all its linears, over what they were; or else
    energy  share of each linear's squared output that is kept

    Raises PlanError without such a step, or when nothing fits.
    """
    if (ratio is None) == (energy is None):
        raise PlanError("give either a ratio (of the parameters) or an energy (share of the output kept)")
    make_plan(checkpoint, layout, recipe, trust_remote_code=trust_remote_code)  # every reason to refuse
    number, step = _step_of(recipe)
    members = _units(layout, selected(step, layout))
    tokens = TextSource(checkpoint).calibration(recipe.calibration).tokens
    spectra = _measure(checkpoint, layout, members, tokens, progress, trust_remote_code)
    options = step.options
    assert isinstance(options, RankOptions)
    units, whole = list(members), sum(one.parameters(None) for one in spectra.values())
    found = [spectra[unit] for unit in units]
    if energy is not None:
        ranks = by_energy(found, energy, options.multiple)
    else:
        ranks = by_budget(found, int((ratio or 0) * whole), options.multiple)
    chosen = dict(zip(units, ranks, strict=True))
    final = _written(recipe, number, layout, members, chosen)
    kept = sum(spectra[unit].parameters(rank) for unit, rank in chosen.items())
    plan = make_plan(checkpoint, layout, final, trust_remote_code=trust_remote_code)
    return Ranks(final, plan, chosen, spectra, (whole, kept))


def _step_of(recipe: Recipe) -> tuple[int, Step]:
    for number, step in enumerate(recipe.steps):
        if isinstance(step.options, RankOptions):
            return number, step
    raise PlanError("no step of the recipe makes linears low rank; use svd-llm, asvd or svd")


def _units(layout: Layout, names: list[str]) -> dict[str, list[str]]:
    """Unit -> its linears. Experts of one kind in a block are loaded as one tensor and share a rank."""
    units: dict[str, list[str]] = {}
    for name in names:
        if layout.by_name[name].block is None:
            raise PlanError(f"{name} has no inputs to measure ranks with; give it a step of its own, with a rank")
        before, expert, after = name.partition(".experts.")
        units.setdefault(f"{before}.experts.*.{after.partition('.')[2]}" if expert else name, []).append(name)
    return units


def _measure(
    checkpoint: Checkpoint,
    layout: Layout,
    members: Mapping[str, list[str]],
    tokens: Tensor,
    progress: Progress,
    trust_remote_code: bool,
) -> dict[str, Spectrum]:
    """Spectra of all units, in one walk over the dense model."""
    stream = StreamedModel(
        checkpoint.config, layout, Weights(checkpoint, layout).live, trust_remote_code=trust_remote_code
    )
    cache, states = BlockCache(checkpoint), stream.embed(tokens, compute_dtype())
    losses: dict[str, Tensor] = {}
    for index in range(layout.blocks):
        prefix = f"{layout.block_name(index)}."
        progress("measure spectra", index, layout.blocks, prefix.rstrip("."))
        inside = [name for names in members.values() for name in names if name.startswith(prefix)]
        with stream.block(index, states.dtype) as block:
            needs = {name.removeprefix(prefix): [Gram] for name in inside}
            with Observer(block, find, needs) as observer:
                for batch in batches(states):
                    observer.start_forward()
                    with suppress(EnoughSeen):
                        stream.run(block, index, batch)
            stream.advance(block, index, states)
        for name in inside:
            module = layout.by_name[name]
            stored = cache.load(f"{name}.weight")
            seen = observer.statistics.get(name.removeprefix(prefix)) or unseen([Gram], module.shape[1])
            losses[name] = spectrum(stored.T if module.transposed else stored, seen[Gram].value)
        cache.clear()
    progress("measure spectra", layout.blocks, layout.blocks, "")
    return {
        unit: Spectrum(_shape(layout, names[0]), len(names), torch.stack([losses[name] for name in names]).sum(0))
        for unit, names in members.items()
    }


def _shape(layout: Layout, name: str) -> tuple[int, int]:
    rows, columns = layout.by_name[name].shape
    return rows, columns


def _written(
    recipe: Recipe, number: int, layout: Layout, members: Mapping[str, list[str]], chosen: Mapping[str, int | None]
) -> Recipe:
    """The recipe with one step per rank; later steps follow as they are."""
    by_rank: dict[int, list[str]] = {}
    for unit, rank in chosen.items():
        if rank is not None:
            by_rank.setdefault(rank, []).extend(members[unit])
    if not by_rank:
        raise PlanError("no linear is better off with low rank; there is nothing to do")
    compressible = [module.name for module in layout.modules if "weight" in module.tensors]
    steps = [step.as_dict() for step in recipe.steps]
    own = {key: value for key, value in steps[number].items() if key != "ratio"}
    steps[number : number + 1] = [
        own | {"rank": rank, "targets": patterns(names, [n for n in compressible if n not in set(names)]), "ignore": []}
        for rank, names in sorted(by_rank.items())
    ]
    return load_recipe(recipe.as_dict() | {"steps": steps, "summary": "ranks chosen from spectra of the outputs"})
