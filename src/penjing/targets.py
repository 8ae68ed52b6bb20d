"""Which modules a step applies to: from a recipe's words (`linear`, names, globs) to names of modules."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping

from penjing.errors import PlanError
from penjing.models.layout import Layout, ModuleKind
from penjing.recipe import Step, did_you_mean

TARGET_GROUPS: Mapping[str, ModuleKind] = {"linear": "linear", "embedding": "embedding", "lm_head": "head"}
"""Names that a recipe may use in `targets` and `ignore` besides module names and globs, and the kind each stands for.

`linear` is every linear of the decoder blocks.
"""


def selected(step: Step, layout: Layout) -> list[str]:
    """Modules a step applies to. Raises PlanError for a pattern that matches nothing or hits a forbidden module."""
    label = step.label
    ignored = {name for pattern in step.ignore for name in _matches(pattern, layout, f"{label}: ignore")}
    chosen: dict[str, None] = {}
    for pattern in step.targets:
        for name in _matches(pattern, layout, f"{label}: targets"):
            module = layout.by_name[name]
            if name in ignored:
                continue
            if layout.never and name in layout.never and pattern not in TARGET_GROUPS:
                raise PlanError(f"{label}: {name} must not be compressed: {layout.never[name]}; add it to `ignore`")
            if module.kind == "head" and layout.tied:
                if layout.embedding.name not in ignored:
                    chosen[layout.embedding.name] = None
            elif module.kind in ("linear", "embedding", "head") and not (layout.never and name in layout.never):
                chosen[name] = None
    if not chosen:
        raise PlanError(f"{label} applies to no module: targets {list(step.targets)}, ignore {list(step.ignore)}")
    return list(chosen)


def _matches(pattern: str, layout: Layout, label: str) -> list[str]:
    if pattern in TARGET_GROUPS:
        found = [module.name for module in layout.modules if module.kind == TARGET_GROUPS[pattern]]
    else:
        names = [module.name for module in layout.modules]
        found = [name for name in names if fnmatch.fnmatchcase(name, pattern) or name.endswith("." + pattern)]
    if not found:
        known = [*TARGET_GROUPS, *dict.fromkeys(module.name.rpartition(".")[2] for module in layout.modules)]
        raise PlanError(f"{label}: {pattern!r} matches no module of {layout.model_type}{did_you_mean(pattern, known)}")
    return found
