"""Lottery ticket: train, prune, go back to the weights of an early step, train again with the mask; several times.

    theta_0 -> theta_k -> theta_T;   M <- M without the 20 % of its weights that are smallest in theta_T;
    theta_k * M -> ... -> theta_T;   and so on: after L levels, 0.8^L of the weights are left

Magnitudes are compared over all matrices of the blocks. From step k on, every level sees the same data in the same
order at the same rates, with fresh moments. The claim is tested against two controls: as many weights left by chance
(`random-mask`), and the found mask on random weights (`random-weights`).

Worked example. 100 weights, share 0.2, two levels: 100 -> 80 -> 64.

Source: Frankle, Carbin 2019, "The Lottery Ticket Hypothesis" (arXiv:1803.03635); rewinding to step k: Frankle et al.
2020 (arXiv:1912.05671).
"""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from penjing.methods.adaptation.recover import MatchLogits
from penjing.methods.pruning.scheduled import HeldMasks, inside
from penjing.methods.training import NextToken, Training, TrainOptions, TrainTask
from penjing.numerics.masks import dropped_of, keep_largest

Control = Literal["none", "random-mask", "random-weights"]


class LotteryOptions(TrainOptions):
    """Recipe keys of the lottery ticket. `steps` is the length of the first level."""

    levels: int = Field(3, ge=1, description="how often it prunes and trains again")
    share: float = Field(0.2, gt=0, lt=1, description="of the weights that are left, how many a level removes")
    rewind: int = Field(0, ge=0, description="the step whose weights a level starts from")
    control: Control = Field("none", description="`random-mask` or `random-weights`: what a ticket must beat")
    loss: Literal["logits", "next-token"] = Field("next-token", description="the text, or the teacher's distribution")
    learning_rate: float = Field(3e-5, gt=0, description="at its highest")

    @model_validator(mode="after")
    def _goes_back(self) -> Self:
        if self.rewind >= self.steps:
            raise ValueError(f"rewind {self.rewind} is not before the end of a level of {self.steps} steps")
        return self

    @property
    def sparsity(self) -> float:
        """Share of the weights that is gone in the end."""
        return 1 - (1 - self.share) ** self.levels


class Ticket(HeldMasks):
    """Masks, and the weights of the step to which every level goes back."""

    def remember(self, model: nn.Module) -> None:
        """Take the weights as they are now as those to go back to."""
        for name, parameter in model.named_parameters():
            value = parameter.detach().clone()
            key = "back " + name.replace(".", "/")
            if key in self._buffers:
                self.get_buffer(key).copy_(value)
            else:
                self.register_buffer(key, value)

    @torch.no_grad()
    def go_back(self, model: nn.Module, control: Control) -> None:
        """Put the remembered weights in place, under the masks."""
        for name, parameter in model.named_parameters():
            before = self.get_buffer("back " + name.replace(".", "/"))
            fresh = control == "random-weights" and name in self.held
            parameter.copy_(torch.randn_like(before) * before.std() if fresh else before)
        self.apply_masks()


def train(task: TrainTask, options: LotteryOptions) -> Training:
    """What is trained: everything, level by level."""
    model = task.model.requires_grad_(True)
    objective = NextToken() if options.loss == "next-token" else MatchLogits(task.teacher())
    ticket = Ticket(objective, inside(task), task.kept)
    ticket.remember(model)

    def after_step(done: int) -> None:
        ticket.apply_masks()
        if done == options.rewind:
            ticket.remember(model)
        rounds, into = divmod(done - options.steps, options.steps - options.rewind)
        if into == 0 and 0 <= rounds < options.levels:
            remove(ticket, options.share, options.control)
            ticket.go_back(model, options.control)

    return Training(model, ticket, after_step, repeats=options.levels, rewind=options.rewind)


@torch.no_grad()
def remove(ticket: Ticket, share: float, control: Control) -> None:
    """Take `share` of all weights that are left away: the smallest, or by chance."""
    names = list(ticket.held)
    kept = torch.cat([ticket.mask(name).flatten() for name in names])
    scores = torch.cat([_scores(ticket.held[name], control).flatten() for name in names])
    gone = int((~kept).sum())
    narrower = keep_largest(scores, gone + dropped_of(int(kept.sum()), share), kept)
    for name, part in zip(names, narrower.split([ticket.mask(name).numel() for name in names]), strict=True):
        ticket.narrow(name, part.reshape(ticket.mask(name).shape))


def _scores(parameter: Tensor, control: Control) -> Tensor:
    return torch.rand_like(parameter) if control == "random-mask" else parameter.abs()
