"""Distillation on what the student itself writes: GKD and MiniLLM as steps.

A student that has only seen other people's sentences meets its own mistakes for the first time when it is used. Here
it continues prompts, and the teacher says at every token what it would have done:

    gkd        a divergence (`jsd` by default) on the student's continuations for a share lambda of the batches, on the
               given text for the others
    minillm    the policy gradient of `minillm`, on continuations drawn from student and teacher mixed, plus a loss on
               the given text

Prompts are what comes before the answers in files of pairs, and the first half of windows of plain text. Nothing is
differentiated through the writing.

Sources: Agarwal et al. 2024, GKD (arXiv:2306.13649), algorithm 1; Gu et al. 2024, MiniLLM (arXiv:2306.08543),
algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pydantic import Field
from torch import Tensor, nn

from penjing.methods.adaptation.recover import hold_zeros
from penjing.methods.distillation.distil import DivergenceOptions, LossName, same_vocabulary
from penjing.methods.distillation.minillm import importance, mixed_sampling, returns, rewards, token_losses
from penjing.methods.distillation.objective import Distillation
from penjing.methods.distillation.sliced import sliced_sum
from penjing.methods.distillation.tokens import TokenLoss, log_probabilities, predictions
from penjing.methods.training import IGNORED, Batch, Loss, NextToken, Teacher, Training, TrainOptions, TrainTask
from penjing.models.outputs import last_states, logits_of
from penjing.models.reading import Written, draw, drawn, end_tokens, write


class GKDOptions(DivergenceOptions):
    """Recipe keys of GKD."""

    loss: LossName = Field("jsd", description="divergence between the two distributions")
    own: float = Field(0.5, ge=0, le=1, description="lambda: share of the micro-batches that the student writes itself")
    new_tokens: int = Field(64, ge=1, description="how many tokens it writes at most")
    sampling_temperature: float = Field(1.0, gt=0, description="of its writing")


class MiniLLMOptions(TrainOptions):
    """Recipe keys of MiniLLM."""

    teacher_share: float = Field(0.2, ge=0, lt=1, description="of the teacher in the distribution that is written from")
    length_normalised: bool = Field(True, description="mean instead of sum of the rewards that follow a token")
    text_weight: float = Field(1.0, ge=0, description="weight of the next-token loss on the given text")
    new_tokens: int = Field(64, ge=1, description="how many tokens are written at most")
    learning_rate: float = Field(5e-6, gt=0, description="at its highest")


def prompts_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """Prompts of a batch, padded on the left: ids and attention, int64 (B, P)."""
    ids, labels = batch["input_ids"], batch["labels"]
    lengths = (labels != IGNORED).int().argmax(1)
    lengths = torch.where(lengths == 0, max(1, ids.shape[1] // 2), lengths)
    longest = int(lengths.max())
    prompts, attention = ids.new_zeros((len(ids), longest)), ids.new_zeros((len(ids), longest))
    for row, length in enumerate(lengths.tolist()):
        prompts[row, longest - length :] = ids[row, :length]
        attention[row, longest - length :] = 1
    return prompts, attention


def continued(prompts: Tensor, attention: Tensor, written: Written) -> Batch:
    """Prompts with what was written after them as a batch, padded on the right; only the writing is learnt."""
    used = torch.cat([attention.bool(), written.mask], 1)
    ids = torch.cat([prompts, written.tokens], 1)
    learnt = torch.cat([torch.zeros_like(attention, dtype=torch.bool), written.mask], 1)
    order = used.int().argsort(dim=1, descending=True, stable=True)
    width = int(used.sum(1).max())
    ids, used, learnt = (part.gather(1, order)[:, :width] for part in (ids, used, learnt))
    ids = ids.masked_fill(~used, 0)
    return {"input_ids": ids, "attention_mask": used.long(), "labels": ids.masked_fill(~learnt, IGNORED)}


class OnPolicy(nn.Module):
    """GKD's objective: that of `Distillation`, on the given batch or on the student's own."""

    def __init__(self, teacher: nn.Module, loss: TokenLoss, own: float, new_tokens: int, temperature: float) -> None:
        super().__init__()
        self.distillation = Distillation(teacher, loss)
        self.own, self.new_tokens, self.temperature = own, new_tokens, temperature

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Which batch it is follows from the random numbers of the step."""
        if float(torch.rand(())) < self.own:
            batch = self.written(model, batch)
        return self.distillation(model, batch)

    def written(self, model: nn.Module, batch: Batch) -> Batch:
        """The student's continuations of the batch's prompts."""
        prompts, attention = prompts_of(batch)

        def choose(number: int, logits: Sequence[Tensor]) -> Tensor:
            return draw(logits[0], self.temperature)

        return continued(
            prompts, attention, write([model], prompts, attention, self.new_tokens, choose, end_tokens(model))
        )


class MiniLLM(nn.Module):
    """MiniLLM's objective. Its value is log q - log p per token that was written; its gradient is the estimate's."""

    def __init__(self, teacher: nn.Module, options: MiniLLMOptions) -> None:
        super().__init__()
        self.teacher = Teacher(teacher)
        self.options, self.text = options, NextToken()

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Mean over the sequences that were written."""
        prompts, attention = prompts_of(batch)
        models = [model, self.teacher.model]
        written = write(models, prompts, attention, self.options.new_tokens, self._choose, end_tokens(model))
        estimate, divergence = self._policy(model, continued(prompts, attention, written))
        value = estimate + (divergence - estimate).detach()
        parts = {"reverse_kl": divergence}
        if self.options.text_weight:
            text = self.text(model, batch).value
            parts["text"] = text.detach()
            value = value + self.options.text_weight * text
        return Loss(value, len(prompts), parts)

    def _choose(self, number: int, logits: Sequence[Tensor]) -> Tensor:
        probabilities = mixed_sampling(logits[0], logits[1], self.options.teacher_share)
        return drawn(probabilities)

    def _policy(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """The policy gradient's loss, and the mean of log q - log p over what was written."""
        ours = last_states(model, batch).last_hidden_state
        with torch.no_grad():
            theirs = last_states(self.teacher.model, batch).last_hidden_state
        at, tokens = predictions(batch["labels"])
        student, teacher = ours[at], theirs[at]
        with torch.no_grad():
            log_q = self._chosen(model, student, tokens)
            log_p = self._chosen(self.teacher.model, teacher, tokens)
            reward = rewards(_placed(log_q, at), _placed(log_p, at), at)
            advantage = returns(reward, at, self.options.length_normalised)[at]
            weight = importance(log_q, log_p, self.options.teacher_share)

        def of_slice(own: Tensor, other: Tensor, *rest: Tensor) -> Tensor:
            with torch.no_grad():
                target = logits_of(self.teacher.model, other)
            return token_losses(logits_of(model, own), target, *rest)

        total = sliced_sum(of_slice, (student, teacher, tokens, weight, advantage))
        return total / len(at), (log_q - log_p).mean()

    def _chosen(self, model: nn.Module, states: Tensor, tokens: Tensor) -> Tensor:
        """log-probabilities of tokens (t,), slice by slice."""
        pieces = zip(states.split(256), tokens.split(256), strict=True)
        return torch.cat(
            [log_probabilities(logits_of(model, state)).gather(-1, token[:, None])[:, 0] for state, token in pieces]
        )


def _placed(values: Tensor, at: Tensor) -> Tensor:
    """Values (t,) at the true places of `at` (B, T), zeros elsewhere."""
    return torch.zeros_like(at, dtype=values.dtype).masked_scatter(at, values)


def train_gkd(task: TrainTask, options: GKDOptions) -> Training:
    """The `train` shape of GKD."""
    teacher = task.teacher()
    same_vocabulary(task.model, teacher)
    objective = OnPolicy(teacher, options.token_loss(), options.own, options.new_tokens, options.sampling_temperature)
    task.model.requires_grad_(True)
    hold_zeros(task)
    return Training(task.model, objective)


def train_minillm(task: TrainTask, options: MiniLLMOptions) -> Training:
    """The `train` shape of MiniLLM."""
    teacher = task.teacher()
    same_vocabulary(task.model, teacher)
    task.model.requires_grad_(True)
    hold_zeros(task)
    return Training(task.model, MiniLLM(teacher, options))
