"""Attention heads by the loss's sensitivity to them, or by how focused their attention is.

    gradient   E_x |dL / d xi_h|, with xi_h = 1 a gate on the output of head h: |sum_t out_h . dL/d out_h| per text
    entropy    H_h = - mean over queries of sum_k p_k log p_k; a focused head has little

The magnitude is taken per text and then averaged; averaging first would let texts cancel. The gate's gradient is
sum over i, j in h of W_ij dL/dW_ij of the linear W that reads the heads, so gradients of weights are enough. Heads
that share a key and value go together; their scores are added, entropies averaged. Entropy alone is a weak criterion.

Worked example: p = [1/2, 1/2] has entropy 0.693, p = [1, 0] has none; the second head is kept.

Sources: Michel, Levy, Neubig 2019, "Are Sixteen Heads Really Better than One?" (arXiv:1905.10650), eq. 2; entropy as
in Voita et al. 2019 (arXiv:1905.09418).
"""

from __future__ import annotations

import torch
from torch import Tensor


def gates(columns: Tensor, gradient: Tensor) -> Tensor:
    """dL / d gate of each unit for one text, fp32 (U,): weights (U, N, S) that read it, and their gradient."""
    return torch.einsum("uns,uns->u", columns, gradient)


def entropy(probabilities: Tensor) -> Tensor:
    """Mean over texts and queries of the entropy of attention in nats, fp64 (H,): probabilities (B, H, T, T)."""
    p = probabilities.double()
    return torch.special.entr(p).sum(-1).mean((0, 2))


def of_groups(scores: Tensor, groups: int) -> Tensor:
    """Mean over the heads of each of `groups` groups: (H,) -> (U,); heads of a group are neighbours."""
    return scores.view(groups, -1).mean(1)
