"""A sparsity of its own for every block or linear: look at the dense model once, write a plain recipe.

The mean is that of the recipe. What comes out names its targets, so that it can be read, changed and run like others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml
from torch import Tensor, nn

from penjing.checkpoint.base import Checkpoint
from penjing.errors import PlanError
from penjing.methods.allocation.owl import by_outliers, by_threshold, magnitude_counts, outlier_ratio
from penjing.models import find
from penjing.models.layout import Layout
from penjing.numerics.precision import compute_dtype
from penjing.pipeline.block import BlockTensors
from penjing.pipeline.menu import targets_for
from penjing.pipeline.observe import Observer
from penjing.pipeline.stream import StreamedModel, batches
from penjing.pipeline.weights import Weights
from penjing.pipeline.written_text import calibration_text
from penjing.planning import Plan, make_plan
from penjing.progress import Progress
from penjing.recipe import Recipe, load_recipe
from penjing.statistics import ColumnNorm
from penjing.targets import selected

SparsityRule = Literal["owl", "magnitude"]


@dataclass(frozen=True)
class Sparsities:
    """What came out.

    recipe  ordinary, ready for `compress`
    plan    what it will do
    by      the rule
    shares  linears of the blocks by full name -> the fraction of weights that each loses
    """

    recipe: Recipe
    plan: Plan
    by: SparsityRule
    shares: Mapping[str, float]

    @property
    def mean(self) -> float:
        """Of all weights of these linears, the fraction that goes."""
        sizes = {name: math.prod(self.plan.layout.by_name[name].shape) for name in self.shares}
        return sum(self.shares[name] * size for name, size in sizes.items()) / sum(sizes.values())

    def recipe_text(self) -> str:
        """The recipe in YAML."""
        return yaml.safe_dump(self.recipe.as_dict(), sort_keys=False)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "model": self.plan.label,
            "by": self.by,
            "mean_sparsity": self.mean,
            "predicted_bytes": self.plan.bytes,
            "sparsities": dict(self.shares),
            "recipe": self.recipe.as_dict(),
        }


@dataclass(frozen=True)
class Look:
    """The dense model, to be seen once, block by block."""

    checkpoint: Checkpoint
    layout: Layout
    recipe: Recipe
    progress: Progress
    trust_remote_code: bool = False

    def magnitudes(self, names: Sequence[str], sparsity: float) -> dict[str, float]:
        """Below one threshold for the linears `names`; no text is read."""
        counts = []
        for number, name in enumerate(names):
            self.progress("count magnitudes", number, len(names), name)
            counts.append(magnitude_counts(self._weight(name)))
        self.progress("count magnitudes", len(names), len(names), "")
        return {name: round(share, 6) for name, share in zip(names, by_threshold(counts, sparsity), strict=True)}

    def outliers(self, names: Sequence[str], sparsity: float, above: float, spread: float) -> dict[str, float]:
        """OWL, one sparsity per block; the last block with one of `names` is the last that runs."""
        wanted, trust = self.recipe.calibration, self.trust_remote_code
        tokens = calibration_text(self.checkpoint, wanted, self.progress, trust_remote_code=trust).tokens
        source = Weights(self.checkpoint, self.layout).live
        stream = StreamedModel(self.checkpoint.config, self.layout, source, trust_remote_code=trust)
        blocks: dict[int, list[str]] = {}
        for name in names:
            blocks.setdefault(self.layout.by_name[name].block or 0, []).append(name)
        states, ratios, total = stream.embed(tokens, compute_dtype()), [], max(blocks) + 1
        for index in range(total):
            self.progress("look for outliers", index, total, self.layout.block_name(index))
            with stream.block(index, compute_dtype()) as block:
                if index in blocks:
                    ratios.append(self._ratio(stream, block, index, blocks[index], states, above))
                stream.advance(block, index, states)
        self.progress("look for outliers", total, total, "")
        members = [blocks[index] for index in sorted(blocks)]
        sizes = [sum(math.prod(self.layout.by_name[name].shape) for name in part) for part in members]
        shares = by_outliers(ratios, sizes, sparsity, spread=spread)
        return {name: round(share, 6) for part, share in zip(members, shares, strict=True) for name in part}

    def _ratio(
        self, stream: StreamedModel, block: nn.Module, index: int, names: Sequence[str], states: Tensor, above: float
    ) -> float:
        """Outlier ratio of the linears `names` on the block's inputs `states`; experts without a token do not count."""
        prefix = f"{self.layout.block_name(index)}."
        with Observer(block, find, {name.removeprefix(prefix): [ColumnNorm] for name in names}) as observer:
            for batch in batches(states):
                with observer.forward():
                    stream.run(block, index, batch)
        norms = {name: observer.statistics[name][ColumnNorm] for name in observer.statistics}
        squares = [norm.value / max(norm.tokens, 1) for norm in norms.values()]
        return outlier_ratio([self._weight(prefix + name) for name in norms], squares, above=above)

    def _weight(self, name: str) -> Tensor:
        """A linear's weight, (N, K) fp32."""
        return BlockTensors(self.checkpoint.load, [self.layout.by_name[name]], "")[f"{name}.weight"]


def distribute(look: Look, *, by: SparsityRule, above: float, spread: float) -> Sparsities:
    """Look and write the recipe. Raises PlanError for a recipe without `sparsity`, or whose steps change the model."""
    recipe, layout = look.recipe, look.layout
    whole = make_plan(look.checkpoint, layout, recipe)
    if whole.drop or whole.rewriting is not None:
        raise PlanError("a recipe that removes blocks or rewrites the model cannot be distributed; do that first")
    steps: list[dict[str, Any]] = []
    shares: dict[str, float] = {}
    for step in recipe.steps:
        sparsity = getattr(step.options, "sparsity", None)
        chosen = [] if sparsity is None else selected(step, layout)
        names = [name for name in chosen if layout.by_name[name].block is not None]
        if sparsity is None or not names:
            steps.append(step.as_dict())
            continue
        try:
            found = look.outliers(names, sparsity, above, spread) if by == "owl" else look.magnitudes(names, sparsity)
        except ValueError as error:
            raise PlanError(f"{step.label}: {error}") from error
        shares |= found
        outside = [name for name in chosen if name not in found]
        steps += [step.as_dict() | {"targets": outside, "ignore": []}] if outside else []
        for value in sorted(set(found.values()) - {0.0}):
            members = [name for name, share in found.items() if share == value]
            steps.append(step.as_dict() | {"sparsity": value, "targets": targets_for(layout, members), "ignore": []})
    if not shares:
        raise PlanError("no step of the recipe has a `sparsity` to distribute; use wanda, sparsegpt, alps or magnitude")
    words = {"owl": "by outliers (OWL)", "magnitude": "below one magnitude"}[by]
    final = load_recipe(recipe.as_dict() | {"steps": steps, "summary": f"sparsity per part {words}"})
    return Sparsities(final, make_plan(look.checkpoint, layout, final), by, shares)
