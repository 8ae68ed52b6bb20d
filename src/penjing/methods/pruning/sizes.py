"""How much of a model goes, in the words that a user thinks in, and the models that a step could leave.

    sparsity   a fraction of the units, or of the blocks
    params     parameters of the whole model that is left, at most
    speedup    decoded tokens per second, over those of the model that the step is given

Width and depth are whole numbers, so the models that one step can leave form a list, the largest first. A size asked
for is the largest in it that fulfils the wish: one unit more and it would not. A speed-up needs a table of latencies
measured on the machine; it is looked up before the work begins and becomes `params` or `drop` in the recipe that is
run, so that the recipe says the same on another machine.

Worked example: parameters 100, 90, 80 of what is left without 0, 1, 2 units; `params: 85` removes two.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from typing import Any, Self

from pydantic import Field, field_validator, model_validator

from penjing.methods.base import Options, Size
from penjing.models.layout import Layout
from penjing.models.shorter import shortened

_SUFFIXES = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


def parse_count(text: str | int) -> int:
    """`"100M"` -> 100,000,000; K, M and B are powers of a thousand. Raises ValueError for anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMB]?)", str(text).strip().upper())
    if not match or not float(match[1]):
        raise ValueError(f"{text!r} is not a number of parameters; write 100M, 1.5B or 134515008")
    return int(match[1]) if not match[2] and match[1].isdigit() else round(float(match[1]) * _SUFFIXES[match[2]])


class TargetOptions(Options):
    """Recipe keys of every step that makes a model narrower or shorter: exactly one of them."""

    sparsity: float | None = Field(None, ge=0, lt=1, description="fraction of the units to remove, rounded down")
    params: str | int | None = Field(None, description="parameters of the result, at most: 100M, 1.5B or a number")
    speedup: float | None = Field(
        None, gt=1, description="tokens decoded per second, over those before the step, measured on this machine"
    )

    @field_validator("params")
    @classmethod
    def _readable(cls, params: str | int | None) -> str | int | None:
        if params is not None:
            parse_count(params)
        return params

    @model_validator(mode="after")
    def _one_of_them(self) -> Self:
        given = [key for key in self.targets() if getattr(self, key)] + ["sparsity"] * (self.sparsity == 0)
        if len(given) != 1:
            said = f"not {' and '.join(f'`{key}`' for key in given)}" if given else "none is there"
            raise ValueError(
                f"give exactly one of {', '.join(f'`{key}`' for key in self.targets())} to say how much; {said}"
            )
        return self

    @classmethod
    def targets(cls) -> tuple[str, ...]:
        """The keys of which a step has exactly one."""
        return ("sparsity", "params", "speedup")


class SizeOptions(TargetOptions):
    """Recipe keys of a step that makes a model narrower."""

    multiple: int = Field(
        1, ge=1, description="widths (heads: all together) become multiples, as groups of a later quantiser may need"
    )


class BlockOptions(TargetOptions):
    """Recipe keys of a step that removes blocks. A step that is run has `drop`; the other keys are worked out first."""

    drop: int = Field(0, ge=0, description="number of blocks to remove")
    sparsity: float | None = Field(None, gt=0, lt=1, description="fraction of the blocks to remove, rounded down")

    @classmethod
    def targets(cls) -> tuple[str, ...]:
        """The keys of which a step has exactly one."""
        return ("drop", *super().targets())


def sizes_of_depth(config: Mapping[str, Any], layout: Layout) -> list[Size]:
    """The models with fewer and fewer blocks, from all of them to one; blocks count as blocks of mean size."""
    inside = sum(module.parameters for module in layout.modules if module.block is not None)
    return [
        Size(
            layout.parameters - inside * gone // layout.blocks,
            layout.blocks - gone,
            {"drop": gone},
            partial(shortened, config, layout.blocks, range(layout.blocks - gone)),
        )
        for gone in range(layout.blocks)
    ]
