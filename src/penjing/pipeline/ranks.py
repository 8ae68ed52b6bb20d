"""Ranks for every linear, from spectra measured in one walk over the dense model: an ordinary recipe comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import yaml
from torch import Tensor

from penjing.checkpoint.base import Checkpoint
from penjing.errors import PlanError
from penjing.methods.low_rank.options import RankOptions
from penjing.methods.low_rank.ranks import Spectrum, by_budget, by_energy, expected_losses, spectrum
from penjing.models import find
from penjing.models.layout import Layout
from penjing.numerics.precision import compute_dtype
from penjing.pipeline.cache import BlockCache
from penjing.pipeline.gradients import (
    GRADIENT_WINDOWS,
    PROBE_LENGTH,
    SquaredGradients,
    squared_gradients,
    weighted_grams,
)
from penjing.pipeline.observe import Observer
from penjing.pipeline.patterns import patterns
from penjing.pipeline.stream import StreamedModel, batches
from penjing.pipeline.weights import Weights
from penjing.pipeline.written_text import calibration_text
from penjing.planning import Plan, make_plan
from penjing.progress import Progress
from penjing.recipe import Recipe, Step, load_recipe
from penjing.statistics import Gram, unseen
from penjing.targets import selected

RankLoss = Literal["gradient", "output"]
"""What a rank loses: nats per token expected from gradients, or the share of the squared output left out."""


@dataclass(frozen=True)
class Ranks:
    """The recipe that came out, and why.

    recipe      ordinary, ready for `compress`
    plan        what it will do
    chosen      unit -> its rank; None: dense. A unit is a linear, or all experts of one kind in a block
    spectra     unit -> what ranks lose
    parameters  of all units as they were, and with the ranks chosen
    by          how losses were estimated
    """

    recipe: Recipe
    plan: Plan
    chosen: Mapping[str, int | None]
    spectra: Mapping[str, Spectrum]
    parameters: tuple[int, int]
    by: RankLoss

    @property
    def loss(self) -> float:
        """What the ranks lose by the estimate that chose them, summed over linears."""
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
            "by": self.by,
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
    by: RankLoss = "gradient",
    progress: Progress,
    trust_remote_code: bool = False,
) -> Ranks:
    """Measure, choose, and write the recipe, in which the first step of low rank becomes one per rank.

    ratio   parameters of all its linears, over what they were, for the least summed loss; or else
    energy  share of each linear's squared output that is kept
    by      what is lost, for a ratio

    Raises PlanError without such a step, or when nothing fits.
    """
    if (ratio is None) == (energy is None):
        raise PlanError("give either a ratio (of the parameters) or an energy (share of the output kept)")
    make_plan(checkpoint, layout, recipe, trust_remote_code=trust_remote_code)  # every reason to refuse
    number, step = _step_of(recipe)
    members = _units(layout, selected(step, layout))
    tokens = calibration_text(checkpoint, recipe.calibration, progress, trust_remote_code=trust_remote_code).tokens
    by = "output" if energy is not None else by
    walk = _Walk(checkpoint, layout, tokens, by, progress, trust_remote_code)
    spectra = walk.spectra(members)
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
    return Ranks(final, plan, chosen, spectra, (whole, kept), by)


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


class _Walk:
    """One pass over the dense model, and one there and back on part of the text where gradients count."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: Layout,
        tokens: Tensor,
        by: RankLoss,
        progress: Progress,
        trust_remote_code: bool,
    ) -> None:
        self.layout, self.tokens, self.progress, self.by = layout, tokens, progress, by
        self._cache = BlockCache(checkpoint)
        source = Weights(checkpoint, layout).live
        self._stream = StreamedModel(checkpoint.config, layout, source, trust_remote_code=trust_remote_code)
        self._gradients: Mapping[str, SquaredGradients] = {}

    def spectra(self, members: Mapping[str, list[str]]) -> dict[str, Spectrum]:
        """Unit -> what ranks lose."""
        inside = self.layout.inside_blocks(name for names in members.values() for name in names)
        probe_tokens = self.tokens[:GRADIENT_WINDOWS, :PROBE_LENGTH]
        probe = None
        if self.by == "gradient":
            self._gradients = squared_gradients(self._stream, probe_tokens, inside, self.progress)
            probe = self._stream.embed(probe_tokens, torch.float32)
        states = self._stream.embed(self.tokens, compute_dtype())
        losses: dict[str, Tensor] = {}
        for index in range(self.layout.blocks):
            self.progress("measure spectra", index, self.layout.blocks, self.layout.block_name(index))
            losses |= self._block(index, states, probe, inside.get(index, []))
            self._cache.clear()
        self.progress("measure spectra", self.layout.blocks, self.layout.blocks, "")
        return {
            unit: Spectrum(
                _shape(self.layout, names[0]), len(names), torch.stack([losses[name] for name in names]).sum(0)
            )
            for unit, names in members.items()
        }

    def _block(self, index: int, states: Tensor, probe: Tensor | None, names: Sequence[str]) -> dict[str, Tensor]:
        """Losses by rank of the linears `names` of a block; all states go through it."""
        prefix = f"{self.layout.block_name(index)}."
        with self._stream.block(index, states.dtype) as block:
            with Observer(block, find, {name: [Gram] for name in names}) as observer:
                for batch in batches(states):
                    with observer.forward():
                        self._stream.run(block, index, batch)
            self._stream.advance(block, index, states)
        weighted = {} if probe is None else weighted_grams(self._stream, index, probe, names, self._gradients)
        losses: dict[str, Tensor] = {}
        for name in names:
            module = self.layout.by_name[prefix + name]
            stored = self._cache.load(f"{prefix}{name}.weight")
            weight = stored.T if module.transposed else stored
            gram = (observer.statistics.get(name) or unseen([Gram], module.shape[1]))[Gram].value
            if probe is None:
                losses[prefix + name] = spectrum(weight, gram)
                continue
            seen, count = self._gradients[prefix + name], probe.shape[0] * probe.shape[1]
            losses[prefix + name] = expected_losses(weight, gram, weighted[name].value, seen.outputs, count)
        return losses


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
