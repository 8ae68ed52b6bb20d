"""Minitron: channels of the residual stream by how large the outputs of the norms are in them.

Of every norm that reads the stream, with a its outputs in windows b of tokens t,

    score_j = sum over norms of sqrt( sum_b ( mean_t |a_btj| )^2 )

The same channels go everywhere: they are columns of the embedding, of q, k, v, gate, up and the head, rows of o and
down, and entries of the norms.

Worked example: one norm, two windows of two tokens, channel 0 [[1, -1], [2, 2]]: means 1 and 2, score sqrt(5).

Source: Muralidharan et al. 2024, "Compact Language Models via Pruning and Knowledge Distillation" (arXiv:2407.14679),
section 2.2, with mean over the sequence and L2 over the batch.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def window_energy(outputs: Tensor) -> Tensor:
    """Sum over windows of the squared mean magnitude of each channel: outputs (B, T, D) -> fp64 (D,)."""
    return outputs.double().abs().mean(1).square().sum(0)


def channel_scores(energies: Iterable[Tensor]) -> Tensor:
    """Scores fp64 (D,) from the `window_energy` of each norm, summed over all batches."""
    return torch.stack([energy.sqrt() for energy in energies]).sum(0)
