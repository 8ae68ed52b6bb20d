"""What a plan refuses: steps that cannot follow each other, schemes that engines would misread."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from penjing.errors import PlanError
from penjing.formats import Format
from penjing.methods.pruning.options import ProtectOptions
from penjing.models.layout import Layout, ModuleSpec
from penjing.numerics.scale_search import free_scales
from penjing.recipe import Recipe, Step
from penjing.representations import Scheme
from penjing.statistics import Gram


def describe(scheme: Scheme) -> str:
    """A scheme in the field's shorthand: "W4 g64 symmetric", "2:4 sparse", "dense"."""
    words = [f"rank {scheme.rank}"] if scheme.rank else [scheme.train.label] if scheme.train else []
    if scheme.pattern:
        words.append(f"{scheme.pattern[0]}:{scheme.pattern[1]} sparse")
    elif scheme.sparsity:
        words.append(f"{scheme.sparsity:.0%} sparse")
    if scheme.grid:
        activations = f"A{scheme.activations.bits}" if scheme.activations else ""
        words.append(f"W{scheme.grid.bits}{activations} {scheme.grid.label}")
    if scheme.activations and scheme.activations.label:
        words.append(scheme.activations.label)
    if scheme.columns:
        words.append(f"{scheme.columns} columns dense")
    if scheme.outliers:
        words.append(f"about {scheme.outliers:.1%} outliers dense")
    if scheme.correction:
        words.append(f"plus {describe(scheme.added)}")
    return ", ".join(words) or "dense"


def check_kind(layout: Layout, recipe: Recipe) -> None:
    """Whether the recipe's steps, format and demands are for this kind of model. Raises PlanError."""
    for step in recipe.steps:
        if step.definition.reads == "encoder" and not layout.encoder:
            raise PlanError(f"{step.label} is for encoders that classify texts; {layout.model_type} is a decoder")
        if step.definition.reads == "decoder" and layout.encoder:
            raise PlanError(
                f"{step.label} walks a decoder block by block, and {layout.model_type} is an encoder; encoders take "
                "`classify`, `trim-vocabulary` and `distil-encoder`"
            )
    if not layout.encoder:
        return
    if recipe.format != "dense" or recipe.kv_cache is not None:
        raise PlanError("an encoder is written as it is and has no key-value cache; set `format: dense`, no `kv_cache`")
    if recipe.require.max_kl or recipe.require.max_perplexity_ratio:
        raise PlanError("an encoder predicts no next token: `require` takes `max_bytes` only")


def pattern_problems(module: ModuleSpec, scheme: Scheme) -> list[str]:
    """N:M needs rows of whole groups, whatever the format."""
    columns = module.shape[1]
    if scheme.pattern is None or columns % scheme.pattern[1] == 0:
        return []
    return [f"the {columns} inputs of {module.name} are not a multiple of the {scheme.pattern[1]} of the pattern"]


def check_step(module: ModuleSpec, before: Scheme, step: Step, earlier: Sequence[Step]) -> None:
    """Whether `step` may follow the `earlier` ones on a module of scheme `before`. Raises PlanError."""
    label = f"{step.label} on {module.name}"
    if any(other.definition.tune for other in earlier):
        raise PlanError(f"{label}: an earlier step trains the finished model; move that step to the end")
    if (step.definition.linear or step.definition.learn) and before.grid is not None:
        raise PlanError(f"{label}: an earlier step already quantised it; prune before quantising, and quantise once")
    if before.train or (before.rank and not _takes_factors(step)):
        raise PlanError(
            f"{label}: an earlier step factored it; factors can be rounded by methods that look at Gram matrices or at "
            "nothing (rtn, gptq, bcq, kmeans), and tensor trains stay as they are"
        )
    if step.definition.transform is not None and earlier:
        raise PlanError(f"{label}: a method that moves scales between modules must be the first to touch them")
    if module.kind == "embedding" and step.definition.needs(step.options):
        raise PlanError(
            f"{label}: the method needs the inputs of a linear and an embedding has none; give embeddings a step "
            "of their own, `method: rtn` with `targets: [embedding]`"
        )
    if step.definition.tune is not None and (not _has_free_scales(before) or before.activations is not None):
        raise PlanError(
            f"{label}: it trains plain scales of groups or channels, or what those of K-quants share, where inputs are "
            "not rounded; put it after the step that quantises, without `activations`, and target only what that step "
            "targets"
        )
    if step.activations and not (step.definition.linear or step.definition.learn):
        raise PlanError(f"{label}: `activations` belongs to the step that quantises the weights")
    if step.activations and step.options.scheme(Scheme(), torch.float32).activations:
        raise PlanError(f"{label}: the method says itself how inputs are rounded; drop `activations`")


def _takes_factors(step: Step) -> bool:
    """Whether the step rounds matrices one by one and asks for nothing that only the inputs themselves can tell."""
    alone = step.options.scheme(Scheme(), torch.float32)
    known = set(step.definition.needs(step.options)) <= {Gram}
    return step.definition.linear is not None and known and not step.activations and alone == Scheme(grid=alone.grid)


def _has_free_scales(scheme: Scheme) -> bool:
    return not (scheme.rank or scheme.correction) and free_scales(scheme.grid)


_MERGED = ("compressed-tensors", "gptq", "gptq-v2", "awq")
"""Formats whose engines merge linears that read the same input."""


def check_fused(layout: Layout, schemes: Mapping[str, Scheme], target: Format) -> None:
    """Engines merge q, k, v and gate, up: those must share a scheme, or the engine decodes garbage."""
    if target.name not in _MERGED:
        return
    for index, groups in enumerate(layout.groups):
        for group in groups:
            names = [f"{layout.block_name(index)}.{linear}" for linear in group.linears]
            if group.fused and len({schemes[name] for name in names}) > 1:
                listed = ", ".join(f"{name}: {describe(schemes[name])}" for name in names)
                raise PlanError(
                    f"engines merge these linears into one matrix, so they need the same scheme: {listed}. "
                    "Target or ignore them together, or use format native"
                )


_HOLDS_SHARED = ("native",)
"""Formats that can say that linears of two blocks have one weight."""


def check_sharing(layout: Layout, recipe: Recipe, target: Format) -> None:
    """What may follow a step after which blocks share weights: methods that look at one matrix, once. Raises PlanError.

    Everything else would need the matrix to be one thing here and another there.
    """
    if not layout.owners:
        return
    if target.name not in _HOLDS_SHARED:
        raise PlanError(
            f"format {target.name} cannot say that blocks share weights, so every copy would be written; use format "
            f"{' or '.join(_HOLDS_SHARED)}"
        )
    for step in recipe.steps:
        made = step.definition
        if made.on_model or made.tune:
            raise PlanError(
                f"{step.label} changes a model in which blocks share weights as a whole, and would part them; put it "
                "before the step that shares"
            )
        if step.activations or step.options.scheme(Scheme(), torch.float32).activations:
            raise PlanError(
                f"{step.label}: where blocks share weights the inputs of each are others, and rounding inputs is not "
                "supported there; quantise weights only"
            )


def check_remake(layout: Layout, step: Step) -> None:
    """Whether `step` can make another model of one with this layout. Raises PlanError."""
    if layout.owners:
        raise PlanError(
            f"{step.label} makes another model of one in which blocks share weights, and would part them; put it "
            "before the step that shares"
        )


def blocks_to_drop(recipe: Recipe, layout: Layout) -> int:
    """How many blocks the recipe's selecting steps remove. Raises PlanError when none would be left."""
    selecting = [step for step in recipe.steps if step.definition.select is not None]
    if open_step := next((step for step in selecting if not getattr(step.options, "drop", 1)), None):
        raise PlanError(f"{open_step.label}: how many blocks go is worked out before a plan is made; give `drop`")
    total = sum(getattr(step.options, "drop", 0) for step in selecting)
    if total >= layout.blocks:
        raise PlanError(f"the recipe removes {total} of {layout.blocks} blocks; at least one must stay")
    left = layout.blocks
    for step in recipe.steps:
        if isinstance(step.options, ProtectOptions) and step.definition.select is not None:
            try:
                free = len(step.options.free_blocks(left))
            except ValueError as error:
                raise PlanError(f"{step.label}: {error}") from error
            drop = getattr(step.options, "drop", 0)
            if drop > free:
                raise PlanError(f"{step.label}: drop: {drop} is more than the {free} blocks that are not protected")
            left -= drop
    return total
