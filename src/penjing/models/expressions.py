"""The little language of the family files: sizes like `heads * head_dim + 2`, conditions like `heads == kv_heads`.

    condition:  "!" name  |  size ("==" | "!=") size  |  name "==" word  |  name
    size:       product (("+" | "-") product)*
    product:    atom (("*" | "//") atom)*
    atom:       integer | name

Names are looked up in the config. Nothing else can be said, so a family file can do nothing but arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from penjing.errors import CheckpointError

_TOKEN = re.compile(r"\s*(//|[+*\-]|\d+|\w+)")


def size(expression: str, values: Mapping[str, Any]) -> int:
    """Value of a size expression. Raises CheckpointError when a name has no integer value."""
    tokens = _TOKEN.findall(expression)
    total, sign, position = 0, 1, 0
    while position < len(tokens):
        product = _atom(tokens[position], expression, values)
        position += 1
        while position < len(tokens) and tokens[position] in ("*", "//"):
            factor = _atom(tokens[position + 1], expression, values)
            product = product * factor if tokens[position] == "*" else product // factor
            position += 2
        total += sign * product
        if position < len(tokens):
            sign = 1 if tokens[position] == "+" else -1
            position += 1
    return total


def sizes(expression: str, values: Mapping[str, Any]) -> tuple[int, ...]:
    """A shape: size expressions separated by commas."""
    return tuple(size(part, values) for part in expression.split(","))


def holds(condition: str | bool, values: Mapping[str, Any]) -> bool:
    """Truth of a condition. A bare or negated name may also be absent from the config, which is false."""
    if isinstance(condition, bool):
        return condition
    for sign in ("==", "!="):
        left, found, right = (part.strip() for part in condition.partition(sign))
        if found:
            value = values[left] if isinstance(values.get(left), str) else size(left, values)
            return (value == (right if isinstance(value, str) else size(right, values))) is (sign == "==")
    return not values.get(condition[1:]) if condition.startswith("!") else bool(values.get(condition))


def _atom(token: str, expression: str, values: Mapping[str, Any]) -> int:
    if token.isdigit():
        return int(token)
    value = values.get(token)
    if type(value) is not int or value < 0:
        raise CheckpointError(f"config.json: `{token}` must be a size (needed for {expression!r}), found {value!r}")
    return value
