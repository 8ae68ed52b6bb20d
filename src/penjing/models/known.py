"""Layouts of known families: the family's facts with the sizes of one config put in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from penjing.models.expressions import holds, size, sizes
from penjing.models.families import FAMILIES, classes_of, classifies, read_family
from penjing.models.layout import InputGroup, Layout, ModuleSpec, Residual, ValueHeads

Facts = Mapping[str, Any]


def known_layout(config: Facts) -> Layout:
    """The layout of a model whose `model_type` has a family file. Raises CheckpointError when a size is missing."""
    name = FAMILIES[config["model_type"]]
    family = read_family(name)
    values = _values(family, config)
    encoder = bool(family.get("encoder"))
    tied = bool(values["tie_word_embeddings"]) and not encoder
    path, blocks = family["block_path"], size(family["layers"], values)
    kinds = [_kind(family, values, index) for index in range(blocks)]
    templates = {kind: _modules(family["block"], kind, values) for kind in set(kinds)}
    modules = _modules(family["before"], None, values)
    for index, kind in enumerate(kinds):
        modules += [replace(spec, name=f"{path}.{index}.{spec.name}", block=index) for spec in templates[kind]]
    after = _modules(family["after"], None, values)
    modules += [replace(spec, tensors={}) if tied and spec.kind == "head" else spec for spec in after]
    groups = {kind: tuple(_groups(family, kind, values)) for kind in templates}
    residual = {kind: _residual(family["residual"], block, values) for kind, block in templates.items()}
    return Layout(
        model_type=config["model_type"],
        family=name,
        modules=tuple(modules),
        block_path=path,
        groups=tuple(groups[kind] for kind in kinds),
        tied=tied,
        norm_offset=family.get("norm_offset", 0.0),
        never=_never(family, modules, path),
        residual=tuple(residual[kind] for kind in kinds),
        heads=_heads(family["heads"], values),
        scaled=family.get("scaled_embedding", False),
        encoder=encoder,
    )


def _values(family: Facts, config: Facts) -> dict[str, Any]:
    """Config values, the family's defaults for those that are absent, and its short names."""
    values = dict(family["defaults"]) | {key: value for key, value in config.items() if value is not None}
    for name, choices in family["sizes"].items():
        choices = [choices] if isinstance(choices, str) else choices
        usable = [choice for choice in choices[:-1] if choice in values]
        values[name] = size((usable or choices[-1:])[0], values)
    if family.get("encoder"):
        values |= {"classifies": classifies(config), "classes": len(classes_of(config))}
    return values


def _kind(family: Facts, values: Facts, index: int) -> str | None:
    """ "sparse" or "dense" in a family where only some blocks have experts, else None."""
    if "sparse" not in family:
        return None
    rule = family["sparse"]
    regular = (index + 1) % size(rule["every"], values) == 0
    return "sparse" if regular and index not in values.get(rule["except"], []) else "dense"


def _modules(table: Facts, kind: str | None, values: Facts) -> list[ModuleSpec]:
    """The modules of a table that this config and this kind of block have."""
    present = {
        name: facts
        for name, facts in table.items()
        if facts.get("in", kind) == kind and all(holds(condition, values) for condition in facts.get("when", []))
    }
    return [
        ModuleSpec(name, facts.get("kind", "linear"), None, _tensors(facts, values), facts.get("transposed", False))
        for name, facts in ((name, present[pattern]) for pattern, name in _expand(list(present), values))
    ]


def _expand(patterns: Sequence[str], values: Facts) -> Iterator[tuple[str, str]]:
    """(pattern, name) with `*` counted through the experts; neighbouring patterns stay together, expert by expert."""
    for starred, run in groupby(patterns, lambda pattern: "*" in pattern):
        names = list(run)
        for expert in range(size("experts", values) if starred else 1):
            yield from ((pattern, pattern.replace("*", str(expert))) for pattern in names)


def _tensors(facts: Facts, values: Facts) -> dict[str, tuple[int, ...]]:
    weight = sizes(facts["weight"], values)
    if not holds(facts.get("bias", False), values):
        return {"weight": weight}
    return {"weight": weight, "bias": weight[-1:] if "transposed" in facts else weight[:1]}


def _groups(family: Facts, kind: str | None, values: Facts) -> Iterator[InputGroup]:
    for facts in family["groups"]:
        if facts.get("in", kind) != kind:
            continue
        linears = facts["linears"]
        conditions = facts.get("source_if", [])
        conditions = [conditions] if isinstance(conditions, str) else conditions
        source = facts.get("source") if all(holds(condition, values) for condition in conditions) else None
        for expert in range(size("experts", values) if "*" in linears[0] else 1):
            fill = _filler(expert)
            inside = facts.get("inside", linears[0])
            yield InputGroup(
                source and fill(source), tuple(map(fill, linears)), fill(inside), facts.get("fused", False)
            )


def _filler(expert: int) -> Callable[[str], str]:
    return lambda pattern: pattern.replace("*", str(expert))


def _residual(facts: Facts, block: Sequence[ModuleSpec], values: Facts) -> Residual:
    """The facts about the stream, for the modules that this kind of block has."""
    names = {spec.name for spec in block}

    def present(patterns: Sequence[str]) -> tuple[str, ...]:
        return tuple(name for _, name in _expand(patterns, values) if name in names)

    readers = {norm: present(patterns) for norm, patterns in facts.get("readers", {}).items()}
    return Residual(readers, present(facts.get("writers", [])), facts.get("fixed", ""))


def _heads(facts: Facts, values: Facts) -> ValueHeads:
    count, width, first, stride = (size(facts[key], values) for key in ("count", "size", "first", "stride"))
    return ValueHeads(facts["value"], facts["output"], count, width, first, stride)


def _never(family: Facts, modules: Sequence[ModuleSpec], path: str) -> dict[str, str]:
    never = family.get("never", {})
    found = {}
    for module in modules:
        inner = module.name.removeprefix(f"{path}.{module.block}.")
        if inner in never:
            found[module.name] = never[inner]
    return found
