"""What a distilled model minimises on a batch, for the one training loop.

    L = soft part (alpha T^2 KL(p_T || q_T), or another divergence) + (1 - alpha) CE(label, q)
        + hidden * TinyBERT's states + attention * its maps + relations * MiniLM's

The logits of student and teacher are made from last hidden states slice by slice, at positions that are learnt only.
States, maps and relations are taken at layers that `layer_map` pairs. TinyBERT's two stages are one training: in the
first part of the steps the soft and hard labels have no weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from penjing.methods.distillation.attention import Attended, attention_loss, visible_pairs
from penjing.methods.distillation.hidden_states import Measure, hidden_state_loss, new_projection
from penjing.methods.distillation.kl import forward_kl
from penjing.methods.distillation.layer_map import watched_layers, watched_states
from penjing.methods.distillation.minilm import minilm_v2_loss
from penjing.methods.distillation.sliced import sliced_sum
from penjing.methods.distillation.soft_labels import with_hard_labels
from penjing.methods.distillation.tokens import TokenLoss, predictions
from penjing.methods.training import Batch, Loss, Teacher
from penjing.models.attention import attention_watched
from penjing.models.outputs import last_states, logits_of


@dataclass(frozen=True)
class Transfer:
    """Weights of what is transferred besides labels; 0 leaves it out.

    relation_heads  into how many the channels are cut for MiniLM's relations
    measure         of the differences of hidden states
    """

    hidden: float = 0.0
    attention: float = 0.0
    relations: float = 0.0
    relation_heads: int = 12
    measure: Measure = "squared"

    @property
    def wanted(self) -> bool:
        """Whether anything is."""
        return max(self.hidden, self.attention, self.relations) > 0


class TeacherAndTransfer(nn.Module):
    """What every objective of distillation has: a teacher, labels that may count later, and what is transferred.

    Logits of labels are left out while `labels_count` is false (TinyBERT's first stage).

    loss      per token or text, from logits (t, V) of student and teacher
    alpha     its weight; the hard label has 1 - alpha
    transfer  of states and attention; None for labels alone
    """

    def __init__(
        self, teacher: nn.Module, loss: TokenLoss = forward_kl, alpha: float = 1.0, transfer: Transfer | None = None
    ) -> None:
        super().__init__()
        self.teacher = Teacher(teacher)
        self.loss, self.alpha = loss, alpha
        self.transfer = transfer or Transfer()
        self.labels_count = True
        self.projection: nn.Parameter | None = None

    def fit(self, student: nn.Module, seed: int = 0) -> None:
        """Make the projection of hidden states when student and teacher differ in width."""
        models: tuple[Any, Any] = student, self.teacher.model
        ours, theirs = (model.config.hidden_size for model in models)
        if self.transfer.hidden and ours != theirs:
            self.projection = nn.Parameter(new_projection(ours, theirs, seed))

    def labels_after(self, first: int) -> Callable[[int], None]:
        """What to call after every step, with the number done, so that labels count once `first` are."""

        def after_step(done: int) -> None:
            self.labels_count = done >= first

        after_step(0)
        return after_step


class Distillation(TeacherAndTransfer):
    """The objective of decoders."""

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Mean over the tokens to be learnt."""
        transfer = self.transfer.wanted
        ours = look(model, batch, everything=transfer)
        with torch.no_grad():
            theirs = look(self.teacher.model, batch, everything=transfer)
        at, labels = predictions(batch["labels"])
        parts: dict[str, Tensor] = {}
        if self.labels_count or not transfer:
            parts["labels"] = self._labels(model, ours.last[at], theirs.last[at], labels)
        if transfer:
            parts |= transferred(self.transfer, ours, theirs, batch, self.projection)
        value = torch.stack(list(parts.values())).sum()
        return Loss(value, max(1, len(labels)), {name: part.detach() for name, part in parts.items()})

    def _labels(self, model: nn.Module, ours: Tensor, theirs: Tensor, labels: Tensor) -> Tensor:
        def of_slice(student: Tensor, teacher: Tensor, wanted: Tensor) -> Tensor:
            with torch.no_grad():
                target = logits_of(self.teacher.model, teacher)
            return with_hard_labels(self.loss, logits_of(model, student), target, wanted, self.alpha)

        return sliced_sum(of_slice, (ours, theirs, labels)) / max(1, len(labels))


@dataclass(frozen=True)
class Seen:
    """What a model computed: last states (B, T, D), and if asked for all states and what attention worked on."""

    last: Tensor
    states: tuple[Tensor, ...]
    attended: Mapping[int, Attended]


def transferred(
    transfer: Transfer,
    ours: Seen,
    theirs: Seen,
    batch: Batch,
    projection: Tensor | None = None,
    *,
    causal: bool = True,
) -> dict[str, Tensor]:
    """The weighed losses of states, attention and relations, by name, for what student and teacher computed."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    pairs = visible_pairs(mask, causal=causal)
    student, teacher = len(ours.attended), len(theirs.attended)
    parts: dict[str, Tensor] = {}
    if transfer.hidden:
        watched = [theirs.states[index] for index in watched_states(teacher, student)]
        loss = hidden_state_loss(ours.states, watched, mask, projection, transfer.measure)
        parts["hidden"] = transfer.hidden * loss
    if transfer.attention:
        layers = enumerate(watched_layers(teacher, student))
        losses = [attention_loss(ours.attended[own], theirs.attended[other], pairs) for own, other in layers]
        parts["attention"] = transfer.attention * torch.stack(losses).sum()
    if transfer.relations:
        last = ours.attended[student - 1], theirs.attended[teacher - 1]
        parts["relations"] = transfer.relations * minilm_v2_loss(*last, pairs, transfer.relation_heads)
    return parts


def look(model: nn.Module, batch: Batch, *, everything: bool) -> Seen:
    """Run the body of a model on a batch. The last of its states is the one after the last norm."""
    if not everything:
        return Seen(last_states(model, batch).last_hidden_state, (), {})
    attended: dict[int, Attended] = {}

    def keep(layer: int, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> tuple[Tensor, Tensor, Tensor]:
        attended.setdefault(layer, Attended(query, key, value, scaling))
        return query, key, value

    with attention_watched(model, keep):
        output: Any = last_states(model, batch, output_hidden_states=True)
    return Seen(output.last_hidden_state, output.hidden_states, attended)
