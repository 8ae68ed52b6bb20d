"""ShortGPT: remove the decoder blocks that change the hidden state least.

The influence of block l is the mean over tokens of 1 - cos(h_l, h_{l+1}), with h before and after the block; blocks
with the lowest influence are removed in one shot. Measure h_{l+1} at the block's own output: the last entry of
`output_hidden_states` has passed the final norm and misjudges the last block.

Worked example: influence = [0.30, 0.05, 0.20, 0.05], drop = 2  ->  blocks 1 and 3.

Source: Men et al. 2024, "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect"
(arXiv:2403.03853), eq. 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.errors import RecipeError
from penjing.methods.pruning.options import ProtectOptions
from penjing.methods.pruning.sizes import BlockOptions


class ShortGPTOptions(BlockOptions, ProtectOptions):
    """Recipe keys of ShortGPT."""


def shortgpt(influence: Tensor, drop: int) -> list[int]:
    """Indices of the `drop` blocks with the smallest `influence` (L,), ascending; of equals the first.

    Raises RecipeError when no block would be left.
    """
    blocks = len(influence)
    if drop >= blocks:
        raise RecipeError(f"shortgpt: drop {drop} leaves none of {blocks} blocks; drop at most {blocks - 1}")
    return sorted(influence.argsort(stable=True)[:drop].tolist())


def select(influence: Tensor, options: ShortGPTOptions) -> list[int]:
    """Blocks to remove, from one influence per block."""
    free = options.free_blocks(len(influence))
    open_to_removal = torch.zeros(len(influence), dtype=torch.bool)
    open_to_removal[free.start : free.stop] = True
    return shortgpt(influence.masked_fill(~open_to_removal, torch.inf), options.drop)
