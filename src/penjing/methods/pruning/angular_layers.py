"""Contiguous blocks by angular distance: cut the run of n blocks whose input and output point the same way.

    d(l, l + n) = arccos( h_l . h_(l+n) / (|h_l| |h_(l+n)|) ) / pi        mean over tokens, h_l the input of block l

h_(l+n) is taken from the block's own output. (The last of transformers' `output_hidden_states` has passed the final
norm and misjudges runs that end with the last block.) The paper looks at the last token of each text; here any sample
of tokens does, which is steadier for few texts.

Worked example: h_0 = [1, 0], h_1 = [0, 1], h_2 = [0, 2], n = 1: distances [0.5, 0], and block 1 goes.

Source: Gromov et al. 2024, "The Unreasonable Ineffectiveness of the Deeper Layers" (arXiv:2403.17887), eq. 7.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from penjing.errors import RecipeError
from penjing.methods.pruning.options import ProtectOptions
from penjing.methods.pruning.sizes import BlockOptions


class RunOptions(BlockOptions, ProtectOptions):
    """Recipe keys of methods that remove neighbouring blocks."""


def angular_distances(states: Tensor, run: int) -> Tensor:
    """Distance over each run of blocks: states (L + 1, T, D) between blocks -> fp64 (L + 1 - run,).

    Raises RecipeError when no block would be left.
    """
    blocks = len(states) - 1
    if run >= blocks:
        raise RecipeError(f"a run of {run} leaves none of {blocks} blocks; drop at most {blocks - 1}")
    before, after = states[: blocks + 1 - run].double(), states[run:].double()
    cosine = torch.cosine_similarity(before, after, dim=-1).clamp(-1, 1)
    return cosine.arccos().mean(1) / math.pi


def nearest_run(states: Tensor, run: int, free: range | None = None) -> list[int]:
    """The `run` neighbouring blocks, all of them in `free`, whose removal turns the hidden state least.

    Of equals the first. Raises RecipeError when no block would be left, or `free` is shorter than the run.
    """
    distances = angular_distances(states, run)
    free = range(len(states) - 1) if free is None else free
    if run > len(free):
        raise RecipeError(f"a run of {run} does not fit into the {len(free)} blocks that may go")
    start = free.start + int(distances[free.start : free.stop - run + 1].argmin())
    return list(range(start, start + run))
