"""White-box distillation as a step: the student at hand learns from the teacher's logits, states and attention.

`loss` chooses the divergence of `kl`, `skewed_kl` or `jsd`; `alpha` mixes in the true next token (`soft_labels`);
`hidden`, `attention` and `relations` add TinyBERT's and MiniLM's transfer (`objective`), alone for a first part of the
steps if `transfer_first` says so. The teacher is the model the recipe started from, or one that `teacher` names.

Source: Hinton et al. 2015 (arXiv:1503.02531); see the modules named above for the rest.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from penjing.errors import PlanError
from penjing.methods.adaptation.recover import hold_zeros
from penjing.methods.distillation.across_vocabularies import AcrossVocabularies
from penjing.methods.distillation.hidden_states import Measure
from penjing.methods.distillation.jsd import generalised_jsd
from penjing.methods.distillation.kl import reverse_kl
from penjing.methods.distillation.objective import Distillation, Transfer
from penjing.methods.distillation.skewed_kl import skewed_forward_kl, skewed_reverse_kl
from penjing.methods.distillation.soft_labels import soft_labels
from penjing.methods.distillation.student import Student, make_student
from penjing.methods.distillation.tokens import TokenLoss
from penjing.methods.training import PREVIOUS, Training, TrainOptions, TrainTask
from penjing.models.layout import Layout

LossName = Literal["forward-kl", "reverse-kl", "skewed-forward-kl", "skewed-reverse-kl", "jsd"]


class DivergenceOptions(TrainOptions):
    """Recipe keys of what student and teacher are compared by."""

    loss: LossName = Field("forward-kl", description="divergence between the two distributions")
    temperature: float = Field(1.0, gt=0, description="divides both logits; its square multiplies the loss")
    beta: float = Field(0.5, ge=0, le=1, description="of jsd: 0 is forward KL, 1 reverse KL")
    skew: float = Field(0.1, ge=0, lt=1, description="of the skewed losses: how much of the first is in the second")

    def token_loss(self) -> TokenLoss:
        """The loss of one token's logits."""
        if self.loss == "forward-kl":
            return partial(soft_labels, temperature=self.temperature)
        losses = {
            "reverse-kl": partial(reverse_kl, temperature=self.temperature),
            "skewed-forward-kl": partial(skewed_forward_kl, skew=self.skew, temperature=self.temperature),
            "skewed-reverse-kl": partial(skewed_reverse_kl, skew=self.skew, temperature=self.temperature),
            "jsd": partial(generalised_jsd, beta=self.beta, temperature=self.temperature),
        }
        loss, factor = losses[self.loss], self.temperature**2
        return lambda student, teacher: factor * loss(student, teacher)


class DistilOptions(DivergenceOptions):
    """Recipe keys of white-box distillation."""

    student: Student | None = Field(
        None,
        description="a smaller model to make first: `layers`, `choice` (`spread`, `first`, `last`, `middle-out`), "
        "`init` (`select`, `random`)",
    )
    alpha: float = Field(1.0, ge=0, le=1, description="weight of the teacher; the true next token has the rest")
    hidden: float = Field(0.0, ge=0, description="weight of TinyBERT's differences of hidden states")
    states: Measure = Field(
        "squared",
        description="differences of hidden states as they are, or `relative` to the teacher's, by token",
    )
    attention: float = Field(0.0, ge=0, description="weight of TinyBERT's squared differences of attention scores")
    relations: float = Field(0.0, ge=0, description="weight of MiniLM's relations in the last layer")
    relation_heads: int = Field(12, ge=1, description="heads into which queries, keys and values are cut for relations")
    vocabularies: Literal["same", "mapped"] = Field(
        "same", description="`mapped`: the teacher may have another one; sorted probabilities are compared (ULD)"
    )
    transfer_first: float = Field(
        0.0, ge=0, le=1, description="share of the steps, the first, in which states and attention alone are learnt"
    )

    @model_validator(mode="after")
    def _transfers(self) -> Self:
        if self.transfer_first and not self.transfer.wanted:
            raise ValueError("`transfer_first` needs a weight for `hidden`, `attention` or `relations`")
        if self.vocabularies == "mapped" and (self.transfer.wanted or self.loss != "forward-kl"):
            raise ValueError("`vocabularies: mapped` compares sorted probabilities, and nothing else of two models")
        return self

    def config(self, config: Mapping[str, Any], layout: Layout) -> Mapping[str, Any]:
        """config.json of the model that is made."""
        return config if self.student is None else self.student.config(config, layout)

    @property
    def transfer(self) -> Transfer:
        """What is learnt besides labels."""
        return Transfer(self.hidden, self.attention, self.relations, self.relation_heads, self.states)


def train(task: TrainTask, options: DistilOptions) -> Training:
    """The method's `train` shape. Raises PlanError when student and teacher have different vocabularies."""
    model = task.model
    teacher = copy.deepcopy(model) if options.teacher == PREVIOUS else task.teacher()
    if options.student is not None:
        model = make_student(model, options.student, options.seed)
    if options.vocabularies == "mapped":
        model.requires_grad_(True)
        return Training(model, AcrossVocabularies(teacher, *task.tokenizers(), options.alpha))
    same_vocabulary(model, teacher)
    objective = Distillation(teacher, options.token_loss(), options.alpha, options.transfer)
    objective.fit(model, options.seed)
    after_step = objective.labels_after(round(options.transfer_first * options.steps))
    model.requires_grad_(True)
    if model is task.model:
        hold_zeros(task)
    return Training(model, objective, after_step=after_step, finish=lambda: model.requires_grad_(False))


def same_vocabulary(student: object, teacher: object) -> None:
    """Raises PlanError when the logits of two models are of different tokens."""
    ours, theirs = (model.config.vocab_size for model in (student, teacher))  # type: ignore[attr-defined]
    if ours != theirs:
        raise PlanError(
            f"the student has {ours} tokens and the teacher {theirs}: their logits mean different things. Set "
            "`vocabularies: mapped`, let the teacher write answers instead (sequence-level distillation), or choose "
            "one of the same vocabulary"
        )
