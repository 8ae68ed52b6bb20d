"""Distillation of encoders that classify texts: labels, soft labels, states, attention and relations.

    L = alpha T^2 KL(p_T || q_T) + (1 - alpha) CE(label, q) + hidden * states + attention * maps + relations * MiniLM's

TinyBERT's two stages are two steps: `stage: general` learns states and attention from texts without labels, `task` what
the classifier does; within the task, `transfer_first` is the share of the steps before soft and hard labels count.
DistilBERT's student begins with layers of its teacher. Every token sees every other one, padding aside.

The teacher is the model at hand where the step makes its own student, and else the one that the recipe started from.

Sources: Jiao et al. 2020, "TinyBERT" (arXiv:1909.10351), section 3; Sanh et al. 2019, "DistilBERT" (arXiv:1910.01108),
section 3; Wang et al. 2020, "MiniLM" (arXiv:2002.10957); Wang et al. 2021, "MiniLMv2" (arXiv:2012.15828).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from penjing.errors import PlanError
from penjing.methods.adaptation.classify import EncoderOptions
from penjing.methods.distillation.attention import Attended
from penjing.methods.distillation.distil import DistilOptions
from penjing.methods.distillation.objective import Seen, TeacherAndTransfer, transferred
from penjing.methods.distillation.soft_labels import with_hard_labels
from penjing.methods.distillation.student import make_student
from penjing.methods.training import Batch, Loss, Training, TrainTask
from penjing.models.attention import attention_watched
from penjing.models.families import classes_of, classifies
from penjing.models.layout import Layout


class EncoderDistilOptions(EncoderOptions, DistilOptions):
    """Recipe keys of distillation for encoders."""

    data: str = Field(description="records with `text`, and for the task `label`, to train on: JSONL or JSON")
    stage: Literal["general", "task"] = Field(
        "task", description="`general`: states, attention and relations on texts alone, before any task is known"
    )
    temperature: float = Field(2.0, gt=0, description="divides both logits; its square multiplies the loss")
    alpha: float = Field(0.9, ge=0, le=1, description="weight of the teacher; the label has the rest")

    @model_validator(mode="after")
    def _general_transfers(self) -> EncoderDistilOptions:
        if self.stage == "general" and not self.transfer.wanted:
            raise ValueError("`stage: general` needs a weight for `hidden`, `attention` or `relations`")
        return self

    def config(self, config: Mapping[str, Any], layout: Layout) -> Mapping[str, Any]:
        """config.json of the model that is made. Raises ValueError for a task without a head for its classes."""
        if self.stage == "task" and not classifies(config):
            raise ValueError("the encoder has no head for classes: `classify` first, or learn in `stage: general`")
        return super().config(config, layout)


class EncoderDistillation(TeacherAndTransfer):
    """The objective. Without labels in a batch, soft ones are left out too."""

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Mean over the texts."""
        everything = self.transfer.wanted
        logits, ours = read(model, batch, everything=everything)
        with torch.no_grad():
            wanted, theirs = read(self.teacher.model, batch, everything=everything)
        parts: dict[str, Tensor] = {}
        if "labels" in batch and (self.labels_count or not everything):
            parts["labels"] = with_hard_labels(self.loss, logits, wanted, batch["labels"], self.alpha).mean()
        if everything:
            parts |= transferred(self.transfer, ours, theirs, batch, self.projection, causal=False)
        value = torch.stack(list(parts.values())).sum()
        return Loss(value, len(logits), {name: part.detach() for name, part in parts.items()})


def read(model: nn.Module, batch: Batch, *, everything: bool) -> tuple[Tensor, Seen]:
    """Logits fp32 (B, C) of a batch, and if asked for all states and what attention worked on."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    if not everything:
        logits: Tensor = model(**inputs).logits
        return logits.float(), Seen(logits, (), {})
    attended: dict[int, Attended] = {}

    def keep(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
        attended[layer] = Attended(query, key, value, scaling)
        return query, key, value

    with attention_watched(model, keep):
        output: Any = model(**inputs, output_hidden_states=True)
    return output.logits.float(), Seen(output.hidden_states[-1], output.hidden_states, attended)


def train(task: TrainTask, options: EncoderDistilOptions) -> Training:
    """The method's `train` shape. Raises PlanError when the teacher has other classes or another vocabulary."""
    model = task.model
    if options.student is None:
        teacher = task.teacher()
    else:
        teacher = copy.deepcopy(model) if options.teacher is None else task.teacher()
        model = make_student(model, options.student, options.seed)
    comparable(model, teacher, options)
    objective = EncoderDistillation(teacher, options.token_loss(), options.alpha, options.transfer)
    objective.fit(model, options.seed)
    after_step = objective.labels_after(round(options.transfer_first * options.steps))
    model.requires_grad_(True)
    return Training(model, objective, after_step=after_step, finish=lambda: model.requires_grad_(False))


def comparable(student: Any, teacher: Any, options: EncoderDistilOptions) -> None:
    """Raises PlanError when the two read other tokens or know other classes."""
    if student.config.vocab_size != teacher.config.vocab_size:
        raise PlanError(
            f"the student reads {student.config.vocab_size} tokens and the teacher {teacher.config.vocab_size}; trim "
            "the vocabulary of the teacher before its student is made"
        )
    ours, theirs = (classes_of(model.config.to_dict()) for model in (student, teacher))
    if options.stage == "task" and ours != theirs:
        raise PlanError(
            f"the student knows the classes {', '.join(ours)} and the teacher {', '.join(theirs)}; `classify` first, "
            "or name a `teacher` that was trained for these classes"
        )
