"""Transfer of hidden states: the student's layers shall compute what chosen layers of the teacher compute.

    TinyBERT      L = mean over tokens and channels of (H_s W - H_t)^2        W (D_s, D_t) is trained with the student
    DistilBERT    L = 1 - cos(h_s, h_t), mean over tokens, last hidden states, equal widths

It is the student that is projected: a projection of the teacher could map everything to zero. One W serves all layers,
as in TinyBERT's code; students as wide as the teacher need none.

Worked example: h_s = (1, 0), h_t = (0, 2): cosine loss 1, squared (1 + 4) / 2 = 2.5 without projection.

Sources: Jiao et al. 2020 (arXiv:1909.10351), eq. 8-9; Sanh et al. 2019 (arXiv:1910.01108), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from penjing.methods.distillation.tokens import mean_over, wide


def hidden_state_loss(
    student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor, projection: Tensor | None = None
) -> Tensor:
    """Sum over layers of the mean squared difference.

    student, teacher  as many hidden states (B, T, D_s) and (B, T, D_t), already paired
    mask              bool (B, T), tokens that are no padding
    projection        (D_s, D_t), trained; None for equal widths

    Raises ValueError when widths differ without a projection.
    """
    if student[0].shape[-1] != teacher[0].shape[-1] and projection is None:
        raise ValueError(
            f"hidden states of width {student[0].shape[-1]} and {teacher[0].shape[-1]} need a trained projection"
        )
    losses = []
    for of_student, of_teacher in zip(student, teacher, strict=True):
        guess = of_student if projection is None else of_student @ projection.to(of_student.dtype)
        squared = (guess - of_teacher.detach().to(guess.dtype)).square()
        losses.append(mean_over(wide(squared).mean(-1), mask))
    return torch.stack(losses).sum()


def cosine_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean over tokens of 1 - cos: states (B, T, D), bool mask (B, T)."""
    cosine = cosine_similarity(wide(student), wide(teacher.detach()), dim=-1)
    return mean_over(1 - cosine, mask)


def new_projection(student: int, teacher: int, seed: int = 0) -> Tensor:
    """A trainable (D_s, D_t) with entries N(0, 1 / D_s), so that projected states keep their size."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(student, teacher, generator=generator) / student**0.5).requires_grad_()
