"""Soft and hard labels: the teacher's softened distribution, and the token that really came.

    L = alpha T^2 KL(p_T || q_T) + (1 - alpha) CE(label, q_1)            p_T = softmax(teacher / T), q_T likewise

At a temperature T > 1 the unlikely tokens, which say what resembles what, weigh more. The gradient by the student's
logits z is

    dL/dz = alpha T (q_T - p_T) + (1 - alpha) (q_1 - onehot(label))

so that T^2 keeps the soft part at the size of the hard one as T grows (q_T - p_T shrinks with 1 / T).

Worked example, two tokens, T = 2, alpha = 1: teacher (2, 0), student (0, 0). p_T = softmax(1, 0) = (0.731, 0.269),
q_T = (1/2, 1/2); KL = 0.1109, L = 0.4438, dL/dz = 2 (-0.231, 0.231).

Source: Hinton, Vinyals, Dean 2015, "Distilling the Knowledge in a Neural Network" (arXiv:1503.02531), section 2.
"""

from __future__ import annotations

from torch import Tensor

from penjing.methods.distillation.kl import forward_kl
from penjing.methods.distillation.tokens import TokenLoss, cross_entropy


def soft_labels(student: Tensor, teacher: Tensor, temperature: float = 2.0) -> Tensor:
    """T^2 KL(p_T || q_T) per token: logits (..., V) -> (...)."""
    return temperature**2 * forward_kl(student, teacher, temperature)


def soft_and_hard_labels(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float = 2.0, alpha: float = 0.5
) -> Tensor:
    """The loss above per token: logits (..., V), labels (...) int64 -> (...). `alpha` weighs the teacher."""
    return with_hard_labels(lambda q, p: soft_labels(q, p, temperature), student, teacher, labels, alpha)


def with_hard_labels(loss: TokenLoss, student: Tensor, teacher: Tensor, labels: Tensor, alpha: float) -> Tensor:
    """alpha loss + (1 - alpha) cross entropy, per token; a part of weight zero is not computed."""
    if alpha == 0:
        return cross_entropy(student, labels)
    soft = loss(student, teacher)
    return soft if alpha == 1 else alpha * soft + (1 - alpha) * cross_entropy(student, labels)
