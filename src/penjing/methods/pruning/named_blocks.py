"""Remove the blocks that a list names: what a search or an allocation found, as a recipe.

    blocks: [4, 9] of 12 blocks   ->   0 1 2 3 5 6 7 8 10 11, numbered anew from 0

Nothing is measured and nothing makes up for them. Later steps see the new numbers.

Source: a search over which blocks go, as in Sieberling et al. 2025, "EvoPress" (arXiv:2410.14649), ends in such a list.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, field_validator

from penjing.methods.base import Options
from penjing.models.layout import Layout
from penjing.models.shorter import shortened


class NamedOptions(Options):
    """Recipe keys of removing named blocks."""

    blocks: tuple[int, ...] = Field(min_length=1, description="numbers of the blocks to remove, from 0")

    @field_validator("blocks")
    @classmethod
    def _each_once(cls, blocks: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(blocks)) < len(blocks) or min(blocks) < 0:
            raise ValueError(f"numbers from 0, each once; not {list(blocks)}")
        return tuple(sorted(blocks))


def config_without(config: Mapping[str, Any], layout: Layout, options: NamedOptions) -> Mapping[str, Any]:
    """config.json of the model that is left. ValueError when there is no such block, or none is left."""
    if options.blocks[-1] >= layout.blocks:
        raise ValueError(f"there is no block {options.blocks[-1]}; the model's are 0 to {layout.blocks - 1}")
    if len(options.blocks) == layout.blocks:
        raise ValueError(f"blocks: all of the {layout.blocks} are named; at least one must stay")
    return shortened(config, layout.blocks, [index for index in range(layout.blocks) if index not in options.blocks])
