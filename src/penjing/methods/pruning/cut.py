"""Removing units as a step of a recipe: how much goes, by which score, and what makes up for it.

Every kind of unit keeps the same number in every block, because config.json has one number for all. `sparsity` is a
fraction of the units; `params` a number of parameters of the whole model that the result does not exceed, as closely
as one unit allows; `speedup` becomes `params` before the work begins (see sizes.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import gcd
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from penjing.methods.base import Remake, Size
from penjing.methods.pruning import llm_pruner
from penjing.methods.pruning.sizes import SizeOptions, parse_count
from penjing.methods.pruning.unit_scores import SCORES, UnitScore, taylor
from penjing.models import layout_of
from penjing.models.couplings import Couplings, UnitKind, find_couplings
from penjing.models.layout import Layout
from penjing.models.narrowing import HEADS, KEY_VALUE_HEADS, Kept, narrow_units
from penjing.numerics.masks import dropped_of

Score = Literal[
    "contribution",
    "magnitude",
    "magnitude-l1",
    "activation",
    "wanda-sp",
    "fluctuation",
    "obs",
    "taylor",
    "taylor-second",
    "taylor-mixed",
    "taylor-vector",
    "gradient",
]
"""Of units of every kind, by the names of `SCORES`."""


class UnitOptions(SizeOptions):
    """Recipe keys of every method that removes neurons or heads."""

    refit: bool = Field(True, description="the linear after the units makes up for those removed, in closed form")


class NeuronOptions(UnitOptions):
    """Recipe keys of removing neurons of the MLP."""

    score: Score = Field("wanda-sp", description="which units stay: those with the highest")


class HeadOptions(UnitOptions):
    """Recipe keys of removing attention heads; heads that share a key and value go together."""

    score: Score | Literal["entropy"] = Field(
        "contribution", description="which groups of heads stay: those with the highest"
    )


class FLAPOptions(SizeOptions):
    """Recipe keys of FLAP."""

    heads: bool = Field(True, description="remove groups of attention heads")
    neurons: bool = Field(True, description="remove neurons of the MLP")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if not (self.heads or self.neurons):
            raise ValueError("`heads` or `neurons` must be true, or there is nothing to remove")
        return self


class LLMPrunerOptions(UnitOptions):
    """Recipe keys of LLM-Pruner."""

    refit: bool = Field(False, description="the linear after the units makes up for those removed; not in the paper")
    order: llm_pruner.Order = Field("first", description="first, second or mixed order of the change of the loss")
    granularity: llm_pruner.Granularity = Field("element", description="what magnitudes are taken of")
    heads: bool = Field(True, description="remove groups of attention heads")
    neurons: bool = Field(True, description="remove neurons of the MLP")

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        if not (self.heads or self.neurons):
            raise ValueError("`heads` or `neurons` must be true, or there is nothing to remove")
        return self


@dataclass(frozen=True, kw_only=True)
class UnitCut(Remake):
    """A model with fewer units in every block.

    score    by which units are kept
    refit    whether the linear after them is refitted
    biased   whether the mean of what goes is put into a bias, which the new config then has
    """

    score: Callable[[Any], UnitScore]
    refit: Callable[[Any], bool]
    biased: bool = False


def kinds_of(options: Any) -> tuple[UnitKind, ...]:
    """The kinds of units that a step removes, in the order of the forward pass."""
    if isinstance(options, HeadOptions):
        return ("heads",)
    if isinstance(options, NeuronOptions):
        return ("neurons",)
    kinds: tuple[UnitKind, ...] = ("heads", "neurons")
    return tuple(kind for kind in kinds if getattr(options, kind))


def narrow_config(
    config: Mapping[str, Any], layout: Layout, options: SizeOptions, *, biased: bool = False
) -> Mapping[str, Any]:
    """config.json of the model that is left. Raises PlanError or ValueError when there is none.

    biased  it has biases where the means of what goes can be
    """
    config, layout, couplings = _prepared(biased, config, layout, options)
    return narrow_units(config, layout, couplings, kept_of(config, layout, options)).config


def kept_of(config: Mapping[str, Any], layout: Layout, options: SizeOptions) -> Kept:
    """How many units of each kind stay. Raises ValueError where a number of parameters cannot be reached."""
    couplings = find_couplings(config, layout)
    return _kept(couplings, kinds_of(options), options, partial(_parameters, layout, couplings))


def _sizes(biased: bool, config: Mapping[str, Any], layout: Layout, options: SizeOptions) -> list[Size]:
    """The models that the step could leave, the largest first."""
    config, layout, couplings = _prepared(biased, config, layout, options)
    found = []
    for kept in _widths(couplings, kinds_of(options), options.multiple):
        parameters = _parameters(layout, couplings, kept)
        make = partial(_narrowed, config, layout, couplings, kept)
        found.append(Size(parameters, layout.blocks, {"params": parameters}, make))
    return found


def _narrowed(config: Mapping[str, Any], layout: Layout, couplings: Sequence[Couplings], kept: Kept) -> dict[str, Any]:
    return narrow_units(config, layout, couplings, kept).config


def _prepared(
    biased: bool, config: Mapping[str, Any], layout: Layout, options: SizeOptions
) -> tuple[Mapping[str, Any], Layout, Sequence[Couplings]]:
    """The model before units go, with the biases that the step gives it. ValueError where nothing can go."""
    heads, groups = (next((config[key] for key in keys if config.get(key)), 1) for keys in (HEADS, KEY_VALUE_HEADS))
    if heads % groups:
        raise ValueError(
            f"{heads} attention heads do not divide into groups for {groups} key-value heads: config.json is damaged"
        )
    couplings = find_couplings(config, layout)
    _require_units(layout, couplings, kinds_of(options))
    if biased:
        config = _with_biases(config, layout, kinds_of(options))
        layout = layout_of(config)
    return config, layout, couplings


def _require_units(layout: Layout, couplings: Sequence[Couplings], kinds: Sequence[UnitKind]) -> None:
    for kind in kinds:
        for index, block in enumerate(couplings):
            if not block.of(kind):
                said = [f"{name}.weight: {reason}" for name, reason in block.unresolved.items()]
                said += [
                    f"{module.name}.{key} is a stack of matrices, which is not taken apart in {layout.model_type}"
                    for module in layout.of_block(index)
                    for key, shape in module.tensors.items()
                    if len(shape) > 2
                ]
                linears = [module.name for module in layout.of_block(index) if module.kind == "linear"]
                raise ValueError(
                    f"{layout.block_name(index)} has no {kind} that can be removed: "
                    + ("; ".join(said) or f"none of {', '.join(linears)} reads units that could go one by one")
                )


def _kept(
    couplings: Sequence[Couplings],
    kinds: Sequence[UnitKind],
    options: SizeOptions,
    parameters: Callable[[Kept], int],
) -> Kept:
    """How many units of each kind stay."""
    steps = _steps(couplings, kinds, options.multiple)
    if options.sparsity is not None:
        return {
            (kind, units): _rounded(units - dropped_of(units, options.sparsity), units, step)
            for (kind, units), step in steps.items()
        }
    if options.params is None:
        raise ValueError("a `speedup` is worked out on the machine before a plan is made; give `sparsity` or `params`")
    target = parse_count(options.params)
    for kept in _widths(couplings, kinds, options.multiple):
        if parameters(kept) <= target:
            return kept
    least = parameters({(kind, units): min(units, step) for (kind, units), step in steps.items()})
    raise ValueError(
        f"params: {options.params} cannot be reached by removing {' and '.join(kinds)} alone: what is left has at "
        f"least {least:,} parameters"
    )


def _steps(couplings: Sequence[Couplings], kinds: Sequence[UnitKind], multiple: int) -> dict[tuple[UnitKind, int], int]:
    """Units of a kind and number that go at a time, so that the width of what is left is a multiple of `multiple`."""
    found = (coupling for block in couplings for coupling in block.found if coupling.kind in kinds)
    steps = {(one.kind, one.units): multiple // gcd(multiple, one.columns.shape[1]) for one in found}
    return dict(sorted(steps.items()))


def _widths(couplings: Sequence[Couplings], kinds: Sequence[UnitKind], multiple: int) -> Iterator[Kept]:
    """How many units of each kind could stay, from all of them down, in the same proportion for all kinds."""
    steps = _steps(couplings, kinds, multiple)
    most, last = max(units for _, units in steps), None
    for left in range(most, 0, -1):
        kept = {(kind, units): max(1, units * left // most) // step * step for (kind, units), step in steps.items()}
        if 0 in kept.values():
            return
        if kept != last:
            yield kept
        last = kept


def _rounded(kept: int, units: int, multiple: int) -> int:
    """The multiple nearest to `kept`, at least one and at most what there is."""
    return min(max(1, round(kept / multiple)), units // multiple) * multiple if multiple <= units else units


def _parameters(layout: Layout, couplings: Sequence[Couplings], kept: Kept) -> int:
    total = layout.parameters
    for index, block in enumerate(couplings):
        for found in block.found:
            gone = found.units - kept.get((found.kind, found.units), found.units)
            modules = {name: layout.by_name[f"{layout.block_name(index)}.{name}"] for name in found.rows}
            consumer = layout.by_name[f"{layout.block_name(index)}.{found.consumer}"]
            total -= gone * found.columns.shape[1] * consumer.shape[0]
            total -= gone * sum(
                rows.shape[1] * (modules[name].shape[1] + ("bias" in modules[name].tensors))
                for name, rows in found.rows.items()
            )
    return total


def _with_biases(config: Mapping[str, Any], layout: Layout, kinds: Sequence[UnitKind]) -> Mapping[str, Any]:
    """The config with biases where the removed units' means go. ValueError where a model has no place for them."""
    couplings = find_couplings(config, layout)
    for kind, key in (("heads", "attention_bias"), ("neurons", "mlp_bias")):
        consumers = [found.consumer for found in couplings[0].of(kind)] if kind in kinds else []
        if all(_has_bias(layout, consumer) for consumer in consumers):
            continue
        changed = {**config, key: True}
        if config["model_type"] == "mistral" or not all(_has_bias(layout_of(changed), name) for name in consumers):
            raise ValueError(
                f"{consumers[0]} of {config['model_type']} has no bias and config.json cannot give it one; use "
                f"`method: {kind}` with `score: fluctuation`, whose refit absorbs the means as far as weights can"
            )
        config = changed
    return config


def _has_bias(layout: Layout, consumer: str) -> bool:
    return "bias" in layout.by_name[f"{layout.block_name(0)}.{consumer}"].tensors


def unit_cut(score: Callable[[Any], UnitScore], *, refit: Callable[[Any], bool], biased: bool = False) -> UnitCut:
    """The row of a method that removes units."""
    return UnitCut(
        config=partial(narrow_config, biased=biased),
        sizes=partial(_sizes, biased),
        keeps_zeros=lambda options: not refit(options),
        backward=lambda options: score(options).looks_at == "gradients",
        score=score,
        refit=refit,
        biased=biased,
    )


def scored(options: NeuronOptions | HeadOptions) -> UnitScore:
    """The score that a step names."""
    return SCORES[options.score]


def llm_pruner_score(options: LLMPrunerOptions) -> UnitScore:
    """LLM-Pruner's, as the step says."""
    return taylor(options.order, options.granularity)
