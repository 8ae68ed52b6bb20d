"""Transfer of hidden states: the student's layers shall compute what chosen layers of the teacher compute.

    TinyBERT      L = mean over tokens and channels of (H_s W - H_t)^2        W (D_s, D_t) is trained with the student
    relative      L = mean over layers and tokens of |H_s W - H_t|^2 / |H_t|^2
    DistilBERT    L = 1 - cos(h_s, h_t), mean over tokens, last hidden states, equal widths

In a decoder whose blocks only add to the stream, a few tokens have states hundreds of times as long as the others
(massive activations), and states grow from layer to layer: squared differences are then those of these tokens and of
the last layers. Relative ones count every token and every layer alike.

It is the student that is projected: a projection of the teacher could map everything to zero. One W serves all layers,
as in TinyBERT's code; students as wide as the teacher need none.

Worked example: h_s = (1, 0), h_t = (0, 2): cosine loss 1, squared (1 + 4) / 2 = 2.5 without projection, relative
(1 + 4) / 4 = 1.25.

Sources: Jiao et al. 2020 (arXiv:1909.10351), eq. 8-9; Sanh et al. 2019 (arXiv:1910.01108), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from penjing.methods.distillation.tokens import mean_over, wide

Measure = Literal["squared", "relative"]

SMALLEST = 1e-12
"""Mean square of a teacher's state below which it counts as this."""


def hidden_state_loss(
    student: Sequence[Tensor],
    teacher: Sequence[Tensor],
    mask: Tensor,
    projection: Tensor | None = None,
    measure: Measure = "squared",
) -> Tensor:
    """Sum over layers of the mean squared difference, or the mean over layers of the relative one.

    student, teacher  as many hidden states (B, T, D_s) and (B, T, D_t), already paired
    mask              bool (B, T), tokens that are no padding
    projection        (D_s, D_t), trained; None for equal widths
    measure           "relative" divides every token's difference by the square of the teacher's state

    Raises ValueError when widths differ without a projection.
    """
    if student[0].shape[-1] != teacher[0].shape[-1] and projection is None:
        raise ValueError(
            f"hidden states of width {student[0].shape[-1]} and {teacher[0].shape[-1]} need a trained projection"
        )
    losses = []
    for of_student, of_teacher in zip(student, teacher, strict=True):
        guess = of_student if projection is None else of_student @ projection.to(of_student.dtype)
        target = of_teacher.detach().to(guess.dtype)
        squared = wide((guess - target).square()).mean(-1)
        if measure == "relative":
            squared = squared / wide(target.square()).mean(-1).clamp(min=SMALLEST)
        losses.append(mean_over(squared, mask))
    together = torch.stack(losses)
    return together.sum() if measure == "squared" else together.mean()


def cosine_loss(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Mean over tokens of 1 - cos: states (B, T, D), bool mask (B, T)."""
    cosine = cosine_similarity(wide(student), wide(teacher.detach()), dim=-1)
    return mean_over(1 - cosine, mask)


def new_projection(student: int, teacher: int, seed: int = 0) -> Tensor:
    """A trainable (D_s, D_t) with entries N(0, 1 / D_s), so that projected states keep their size."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(student, teacher, generator=generator) / student**0.5).requires_grad_()
