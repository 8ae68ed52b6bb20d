"""Names of modules as short lists of patterns, in the language that compressed-tensors and vLLM read.

A target is the full name of a module, the name of a class ("Linear", "Embedding"), or `re:` and a regular
expression that must match from the start of the name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from penjing.models.layout import ModuleSpec


def class_of(module: ModuleSpec) -> str:
    """Name of the class that engines give the module; empty when its weight is no matrix."""
    if len(module.tensors.get("weight", ())) != 2:
        return ""
    if module.kind == "embedding":
        return "Embedding"
    return "Conv1D" if module.transposed else "Linear"


def summarise(chosen: Iterable[str], everything: Iterable[str]) -> list[str]:
    """Targets that match the names in `chosen` and no other name in `everything`.

    Names that differ in block and expert numbers only become one regular expression when all of them are chosen.
    """
    families: dict[str, set[str]] = {}
    for name in everything:
        families.setdefault(_family(name), set()).add(name)
    targets: dict[str, None] = {}
    wanted = dict.fromkeys(chosen)
    for name in wanted:
        members = families[_family(name)]
        whole = len(members) > 1 and members <= wanted.keys()
        targets[f"re:{_family(name)}$" if whole else name] = None
    return list(targets)


def _family(name: str) -> str:
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))


def find_target(module: ModuleSpec, targets: Sequence[str]) -> str | None:
    """The target that matches the module, the most specific first: name, expression, class; None without a match."""
    if module.name in targets:
        return module.name
    for target in targets:
        if target.startswith("re:") and re.match(target.removeprefix("re:"), module.name):
            return target
    kind = class_of(module)
    return kind if kind and kind in targets else None
