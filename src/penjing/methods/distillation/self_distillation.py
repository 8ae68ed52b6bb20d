"""Self-distillation: a model's last layer teaches its earlier ones.

Exits after some blocks read their hidden state through the model's own last norm and head, and learn from label and
last layer alike:

    L = CE(label, q_last) + mean over exits of [ (1 - a) CE(label, q_l) + a T^2 KL(q_last || q_l) + b (h_l - h_last)^2 ]

q_last and h_last without gradient. A model so trained can leave blocks out, from the end, and keep speaking: depth is
chosen after training. Born-again networks, the other kind, need no loss of their own: a student of the teacher's shape
is trained from fresh weights with the teacher's soft labels (`distil` with `student: {init: random}`), and then teaches
the next (another such step with `teacher: previous`).

Sources: Zhang et al. 2019, "Be Your Own Teacher" (arXiv:1905.08094), eq. 3-6; Furlanello et al. 2018, "Born-Again
Neural Networks" (arXiv:1805.04770).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from penjing.errors import PlanError
from penjing.methods.distillation.hidden_states import hidden_state_loss
from penjing.methods.distillation.sliced import sliced_sum
from penjing.methods.distillation.soft_labels import soft_and_hard_labels
from penjing.methods.distillation.student import Student, make_student
from penjing.methods.distillation.tokens import cross_entropy, predictions
from penjing.methods.training import Batch, Loss, Training, TrainOptions, TrainTask
from penjing.models.layout import Layout
from penjing.models.outputs import body_of, last_states, logits_of


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


class ExitOptions(TrainOptions):
    """Recipe keys of self-distillation with early exits."""

    exits: tuple[int, ...] = Field(min_length=1, description="numbers of blocks after which the model may end")
    keep: int | None = Field(None, ge=1, description="how many blocks are written, one of `exits`; default: all")
    temperature: float = Field(2.0, gt=0, description="divides both logits; its square multiplies the loss")
    alpha: float = Field(
        0.5, ge=0, le=1, description="weight of the last layer in an exit's loss; labels have the rest"
    )
    hidden: float = Field(0.0, ge=0, description="weight of relative differences to the last layer's states")

    @model_validator(mode="after")
    def _keeps_an_exit(self) -> Self:
        if min(self.exits) < 1 or (self.keep is not None and self.keep not in self.exits):
            raise ValueError(f"`exits` are 1 or more, and `keep` is one of {list(self.exits)}")
        return self

    def config(self, config: Mapping[str, Any], layout: Layout) -> Mapping[str, Any]:
        """config.json of the model that is written. Raises ValueError for an exit behind the last block."""
        if max(self.exits) >= layout.blocks:
            raise ValueError(f"an exit after block {max(self.exits)} is not early: the model has {layout.blocks}")
        return config if self.keep is None else self._student(self.keep).config(config, layout)

    def finished(self, model: nn.Module) -> nn.Module:
        """The trained model with the blocks that are kept."""
        return model if self.keep is None else make_student(model, self._student(self.keep))

    @staticmethod
    def _student(blocks: int) -> Student:
        return Student(layers=blocks, choice="first")


class EarlyExits(nn.Module):
    """The objective of `exit_losses`, with hidden states, for exits after the blocks of these numbers."""

    def __init__(self, options: ExitOptions) -> None:
        super().__init__()
        self.options = options

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Mean over the tokens to be learnt."""
        options = self.options
        output: Any = last_states(model, batch, output_hidden_states=True)
        norm = last_norm(model)
        at, labels = predictions(batch["labels"])
        exits = [norm(output.hidden_states[block])[at] for block in options.exits]
        last = output.last_hidden_state[at]

        def of_slice(own: Tensor, wanted: Tensor, *early: Tensor) -> Tensor:
            logits = [logits_of(model, states) for states in early]
            return exit_losses(logits, logits_of(model, own), wanted, options.temperature, options.alpha)

        count = max(1, len(labels))
        parts = {"labels": sliced_sum(of_slice, (last, labels, *exits)) / count}
        if options.hidden:
            everywhere = torch.ones(1, count, dtype=torch.bool, device=last.device)
            found = [states[None] for states in exits]
            difference = hidden_state_loss(found, [last[None]] * len(found), everywhere, measure="relative")
            parts["hidden"] = options.hidden * difference
        value = torch.stack(list(parts.values())).sum()
        return Loss(value, count, {name: part.detach() for name, part in parts.items()})


def last_norm(model: nn.Module) -> nn.Module:
    """The norm between the last block and the head. Raises PlanError where the body has none, or more behind it."""
    children = list(body_of(model).named_children())
    norms = [child for _, child in children if "norm" in type(child).__name__.lower()]
    if not norms or any(name == "project_out" for name, _ in children):
        raise PlanError(f"{type(model).__name__} does not read its head through one last norm; it has no early exits")
    return norms[-1]


def train(task: TrainTask, options: ExitOptions) -> Training:
    """The method's `train` shape."""
    last_norm(task.model)
    task.model.requires_grad_(True)
    return Training(task.model, EarlyExits(options), finish=lambda: options.finished(task.model.requires_grad_(False)))
