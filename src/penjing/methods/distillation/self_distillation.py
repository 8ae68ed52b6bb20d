"""Self-distillation: a model's last layer teaches its earlier ones.

Exits after some blocks read their hidden state through the model's own last norm and head, and learn from label and
last layer alike:

    L = CE(label, q_last) + mean over exits of [ (1 - a) CE(label, q_l) + a T^2 KL(q_last || q_l) + b (h_l - h_last)^2 ]

q_last and h_last without gradient. A model so trained can leave blocks out, from the end, and keep speaking: depth is
chosen after training. Born-again networks, the other kind, need no loss of their own: a student of the teacher's shape
is trained from fresh weights with the teacher's soft labels, and then teaches the next.

Sources: Zhang et al. 2019, "Be Your Own Teacher" (arXiv:1905.08094), eq. 3-6; Furlanello et al. 2018, "Born-Again
Neural Networks" (arXiv:1805.04770).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from penjing.methods.distillation.soft_labels import soft_and_hard_labels
from penjing.methods.distillation.tokens import cross_entropy


def exit_losses(
    exits: Sequence[Tensor], last: Tensor, labels: Tensor, temperature: float = 2.0, alpha: float = 0.5
) -> Tensor:
    """Per token (...): the last layer's cross entropy plus the mean of the exits' losses, without the hidden states.

    exits, last  logits (..., V); labels (...) int64
    """
    own = cross_entropy(last, labels)
    if not exits:
        return own
    taught = [soft_and_hard_labels(exit, last.detach(), labels, temperature, alpha) for exit in exits]
    return own + torch.stack(taught).mean(0)
