"""What may become of a unit, in words: `4`, `3g64`, `2:4`, `50%`, `2:4+4g32`, `bcq(bits=2)`, `dense`, `drop`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import yaml

from penjing.errors import PlanError
from penjing.methods import METHODS
from penjing.recipe import Step, did_you_mean

_WORDS = re.compile(r"(?P<sparse>\d+:\d+|\d+(?:\.\d+)?%)?(?P<plus>\+)?(?:(?P<bits>\d+)(?:g(?P<group>\d+))?)?")

_DROP = "drop"


@dataclass(frozen=True)
class Choice:
    """One choice. All None: the unit stays dense.

    bits        on the recipe's grid
    group_size  None: the recipe's
    sparsity    fraction removed
    pattern     or N:M
    method      another method in place of the recipe's, with `keys`
    """

    bits: int | None = None
    group_size: int | None = None
    sparsity: float | None = None
    pattern: str | None = None
    method: str | None = None
    keys: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        if self.method is not None:
            inside = " ".join(f"{key}={value}" for key, value in self.keys)
            return f"{self.method}({inside})" if inside else self.method
        group = "" if self.group_size is None else f"g{self.group_size}"
        bits = "" if self.bits is None else f"{self.bits}{group}"
        sparse = self.pattern or ("" if self.sparsity is None else f"{100 * self.sparsity:g}%")
        return "+".join(word for word in (sparse, bits) if word) or "dense"

    @property
    def dense(self) -> bool:
        """The unit stays as it is."""
        return self == Choice()

    @property
    def drops(self) -> bool:
        """The whole block that the unit is in goes."""
        return self.method == _DROP

    @property
    def step_of_bits(self) -> bool:
        """Bits and nothing else, or dense: what only a step with `bits` can vary."""
        return self.sparsity is None and self.pattern is None and self.method is None

    def step(self, given: Step) -> dict[str, Any]:
        """The step for this choice in place of `given`, without its targets. Not for `dense`.

        Raises PlanError when the recipe's method has no key for it.
        """
        if self.method is not None:
            return {"method": self.method, **dict(self.keys)}
        own, fields = given.as_dict(), type(given.options).model_fields
        keys = own
        if self.sparsity is not None or self.pattern is not None:
            fits = "sparsity" in fields and ("bits" in fields or self.bits is None)
            keys = own if fits else {"method": "sparsegpt"} | {key: own[key] for key in ("group_size",) if key in own}
            keys = {key: value for key, value in keys.items() if key not in ("sparsity", "pattern", "bits")}
            keys |= {"pattern": self.pattern} if self.pattern else {"sparsity": self.sparsity}
        elif "bits" not in fields:
            raise PlanError(f"choice {self}: method {given.method} has no `bits`; write 50%+{self} or name a method")
        if self.bits is not None:
            keys = keys | {"bits": self.bits}
        if self.group_size is not None:
            if "group_size" not in own and keys["method"] != "sparsegpt":
                raise PlanError(f"choice {self}: method {given.method} has no `group_size`")
            keys = keys | {"group_size": self.group_size}
        return keys


def read_choices(text: str) -> tuple[Choice, ...]:
    """Choices from words with commas between them. Raises PlanError naming the word that is none."""
    words = [word.strip() for word in re.split(r",(?![^(]*\))", text)]
    return tuple(dict.fromkeys(_read(word) for word in words))


def _read(word: str) -> Choice:
    if word == "dense":
        return Choice()
    if word == _DROP:
        return Choice(method=_DROP)
    if method := re.fullmatch(r"([a-z][\w-]*)(?:\((.*)\))?", word):
        return _method(word, method[1], method[2] or "")
    match = _WORDS.fullmatch(word)
    if not word or match is None or bool(match["plus"]) != bool(match["sparse"] and match["bits"]):
        raise PlanError(
            f"choice {word!r} is neither bits (3), nor bits and a group size (3g64), nor a sparsity (50%, 2:4) with or "
            "without bits (2:4+4), nor a method (ternary), nor `dense`, nor `drop`"
        )
    bits, group = (int(match[part]) if match[part] else None for part in ("bits", "group"))
    sparse = match["sparse"] or ""
    share = float(sparse[:-1]) / 100 if sparse.endswith("%") else None
    return Choice(bits, group, share, sparse if ":" in sparse else None)


def _method(word: str, name: str, inside: str) -> Choice:
    known = [method.name for method in METHODS.values() if method.linear]
    if name not in known:
        raise PlanError(f"choice {word!r} is neither bits (3) nor a method for one linear{did_you_mean(name, known)}")
    keys = [part.partition("=") for part in inside.replace(",", " ").split()]
    if not all(equals and value for _, equals, value in keys):
        raise PlanError(f"choice {word!r}: write keys as in {name}(key=value key=value)")
    return Choice(method=name, keys=tuple((key, yaml.safe_load(value)) for key, _, value in keys))
