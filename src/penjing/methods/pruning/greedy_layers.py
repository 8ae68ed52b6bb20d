"""Greedy removal of blocks by loss: take out the block that hurts the model least, look again, repeat.

Scores taken once ignore that two blocks may each be superfluous but not both. Here every remaining block is tried in
every round, and the loss is that of the model itself without it: KL divergence from the whole model, or the negative
log-likelihood of the text.

Worked example: losses without block 0, 1, 2 are 0.3, 0.1, 0.2: block 1 goes; then without 0 or 2 too: 0.9, 0.5: 2 goes.

Source: Song et al. 2024, "SLEB: Streamlining LLMs through Redundancy Verification and Elimination of Transformer
Blocks" (arXiv:2402.09025), algorithm 1; KL as in Sieberling et al. 2024, EvoPress (arXiv:2410.14649).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

from pydantic import Field

from penjing.errors import RecipeError
from penjing.methods.pruning.options import ProtectOptions
from penjing.methods.pruning.sizes import BlockOptions


class GreedyOptions(BlockOptions, ProtectOptions):
    """Recipe keys of greedy removal of blocks."""

    loss: Literal["kl", "perplexity"] = Field("kl", description="what is measured without each block")
    windows: int = Field(4, ge=1, description="calibration windows it is measured on, from the first")


def greedy(
    blocks: int, drop: int, losses: Callable[[Sequence[int]], Sequence[float]], free: range | None = None
) -> list[int]:
    """Indices of `drop` blocks to remove, ascending, all of them in `free`.

    losses  of the model of blocks `keep` without each of them in turn, as many as `keep` is long

    Raises RecipeError when no block would be left, or more should go than are free.
    """
    free = range(blocks) if free is None else free
    if drop > len(free) and drop < blocks:
        raise RecipeError(f"drop {drop} is more than the {len(free)} blocks that may go")
    if drop >= blocks:
        raise RecipeError(f"drop {drop} leaves none of {blocks} blocks; drop at most {blocks - 1}")
    keep = list(range(blocks))
    for _ in range(drop):
        found = losses(keep)
        del keep[min((at for at, block in enumerate(keep) if block in free), key=lambda at: found[at])]
    return sorted(set(range(blocks)) - set(keep))
