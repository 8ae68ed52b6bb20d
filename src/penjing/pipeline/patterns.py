"""Module names as short lists of globs, in the language of a recipe's `targets`."""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Sequence
from itertools import product


def patterns(chosen: Sequence[str], forbidden: Collection[str]) -> list[str]:
    """Few globs that match every name in `chosen` and none in `forbidden`, those that match most first.

    A glob stars some numbers of a name (`layers.*.mlp.down_proj`) or its end (`layers.3.*`); where none is allowed, the
    name stands for itself.

    >>> patterns(["a.0.up", "a.1.up", "a.1.down"], ["a.0.down"])
    ['a.*.up', 'a.1.down']
    """
    barred = {pattern for name in forbidden for pattern in _candidates(name)}
    reach: dict[str, list[str]] = {}
    for name in chosen:
        for pattern in _candidates(name):
            if pattern not in barred:
                reach.setdefault(pattern, []).append(name)
    left = dict.fromkeys(chosen)
    found = []
    for pattern in sorted(reach, key=lambda pattern: -len(reach[pattern])):
        new = [name for name in reach[pattern] if name in left]
        if len(new) > 1 and not fnmatch.filter(forbidden, pattern):
            found.append(pattern)
            for name in new:
                del left[name]
    return [*found, *left]


def _candidates(name: str) -> list[str]:
    parts = name.split(".")
    found = []
    for starred in product(*(["*", part] if part.isdigit() else [part] for part in parts)):
        found.append(".".join(starred))
        found += [".".join([*starred[:length], "*"]) for length in range(1, len(parts))]
    return list(dict.fromkeys(found))
