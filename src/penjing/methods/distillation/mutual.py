"""Mutual learning: students that teach each other while they learn, without a teacher that was there before.

    L_i = CE(label, q_i) + 1 / (K - 1) sum_{j != i} KL(q_j || q_i)            q_j without gradient

Worked example, two students that agree: both divergences are 0, each learns from the label alone.

Source: Zhang et al. 2018, "Deep Mutual Learning" (arXiv:1706.00384), eq. 1-5 (simultaneous update).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penjing.methods.distillation.kl import forward_kl
from penjing.methods.distillation.tokens import cross_entropy


def mutual_losses(students: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    """One loss per token (...) for each student's logits (..., V); labels (...) int64. Raises ValueError for one."""
    if len(students) < 2:
        raise ValueError("mutual learning takes two students or more")
    losses = []
    for index, student in enumerate(students):
        peers = [forward_kl(student, peer) for other, peer in enumerate(students) if other != index]
        losses.append(cross_entropy(student, labels) + torch.stack(peers).mean(0))
    return losses
