"""Mutual learning: students that teach each other while they learn, without a teacher that was there before.

    L_i = CE(label, q_i) + 1 / (K - 1) sum_{j != i} KL(q_j || q_i)            q_j without gradient

As a step, students are made of the model at hand (other layers, other fresh weights) and learn side by side from the
same batches; the first is the model that goes on, the others are dropped when it ends.

Worked example, two students that agree: both divergences are 0, each learns from the label alone.

Source: Zhang et al. 2018, "Deep Mutual Learning" (arXiv:1706.00384), eq. 1-5 (simultaneous update).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from penjing.methods.distillation.kl import forward_kl
from penjing.methods.distillation.sliced import sliced_sum
from penjing.methods.distillation.student import Student, make_student
from penjing.methods.distillation.tokens import cross_entropy, predictions
from penjing.methods.training import Batch, Loss, Training, TrainOptions, TrainTask
from penjing.models.layout import Layout
from penjing.models.outputs import last_states, logits_of


def mutual_losses(students: Sequence[Tensor], labels: Tensor) -> list[Tensor]:
    """One loss per token (...) for each student's logits (..., V); labels (...) int64. Raises ValueError for one."""
    if len(students) < 2:
        raise ValueError("mutual learning takes two students or more")
    losses = []
    for index, student in enumerate(students):
        peers = [forward_kl(student, peer) for other, peer in enumerate(students) if other != index]
        losses.append(cross_entropy(student, labels) + torch.stack(peers).mean(0))
    return losses


class MutualOptions(TrainOptions):
    """Recipe keys of mutual learning."""

    students: tuple[Student, ...] = Field(
        min_length=2, description="two or more; each as `student` of `distil`. The first is the one that stays"
    )

    def config(self, config: Mapping[str, Any], layout: Layout) -> Mapping[str, Any]:
        """config.json of the first student; ValueError when one of them cannot be made."""
        first, *_ = [student.config(config, layout) for student in self.students]
        return first

    def trained(self, layout: Layout) -> int:
        """All of them."""
        return len(self.students) * layout.parameters


class MutualLearning(nn.Module):
    """The objective: the sum of every student's loss. The model it is called with is the first, `peers` the others."""

    def __init__(self, peers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.peers = nn.ModuleList(peers)

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Mean over the tokens to be learnt."""
        students = [model, *self.peers]
        at, labels = predictions(batch["labels"])
        states = [last_states(student, batch).last_hidden_state[at] for student in students]

        def of_slice(*parts: Tensor) -> Tensor:
            logits = [logits_of(student, part) for student, part in zip(students, parts[:-1], strict=True)]
            return torch.stack(mutual_losses(logits, parts[-1])).sum(0)

        count = max(1, len(labels))
        return Loss(sliced_sum(of_slice, (*states, labels)) / count, count)


def train(task: TrainTask, options: MutualOptions) -> Training:
    """The method's `train` shape. Fresh weights differ from student to student."""
    made = [make_student(task.model, each, options.seed + place) for place, each in enumerate(options.students)]
    for student in made:
        student.requires_grad_(True)
    return Training(made[0], MutualLearning(made[1:]), finish=lambda: made[0].requires_grad_(False))
