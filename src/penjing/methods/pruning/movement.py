"""Movement pruning: train, and keep the weights that training moves away from zero.

    W' = W * M,  M = the largest scores S        what the model computes with
    dL/dS = dL/dW' * W                           straight through: as if the mask were the score
    dL/dW = dL/dW' * M                           a weight that is masked rests, and its score goes on

Descent on S adds up - dL/dW' * W: the score of a weight rises while the loss pushes it away from zero, falls while it
is drawn there, and nothing asks how large it is. Masks follow the scores, so that a weight may come back; how many
stay follows the cubic schedule. The loop's own AdamW trains scores, as in the published code, at a rate of their own.

Worked example. W = [1, -1], dL/dW' = [-1, -1]: descent makes it [1 + a, -1 + a]; dL/dS = [-1, 1], so S = [a, -a] and
the second goes, though both are as large.

Source: Sanh, Wolf, Rush 2020, "Movement Pruning: Adaptive Sparsity by Fine-Tuning" (arXiv:2005.07683), eq. 2-4, hard
movement; its authors compare scores within a matrix or over all (`scope`).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from penjing.methods.adaptation.low_rank_change import matrices, merge
from penjing.methods.adaptation.recover import MatchLogits
from penjing.methods.pruning.gradual import cubic
from penjing.methods.training import NextToken, Training, TrainOptions, TrainTask
from penjing.numerics.masks import dropped_of, keep_largest


class MovementOptions(TrainOptions):
    """Recipe keys of movement pruning."""

    sparsity: float = Field(0.5, gt=0, lt=1, description="share of the matrices of the blocks that is gone in the end")
    scope: Literal["global", "layer"] = Field("layer", description="scores that compete: all, or those of a matrix")
    begin: float = Field(0.1, ge=0, lt=1, description="share of the steps before anything is removed")
    until: float = Field(0.7, gt=0, le=1, description="share of the steps after which no more is removed")
    every: int = Field(10, ge=1, description="steps between two masks")
    score_rate: float = Field(1e-2, gt=0, description="learning rate of the scores, at its highest")
    loss: Literal["logits", "next-token"] = Field("logits", description="the teacher's distribution, or the text")
    learning_rate: float = Field(3e-5, gt=0, description="of the weights, at its highest")

    @model_validator(mode="after")
    def _begins_first(self) -> MovementOptions:
        if self.begin >= self.until:
            raise ValueError(f"begin {self.begin} is not before until {self.until}")
        return self


class _StraightThrough(torch.autograd.Function):
    """weight * mask, whose gradient by the scores is that by the mask."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, scores: Tensor, mask: Tensor) -> Tensor:
        ctx.save_for_backward(weight, mask)
        return weight * mask

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        weight, mask = ctx.saved_tensors
        return gradient * mask, (gradient * weight).flatten(), None


class Moving(nn.Module):
    """The parametrisation of one matrix: its scores, which are trained, and the mask they led to."""

    mask: Tensor
    kept: Tensor

    def __init__(self, weight: Tensor, kept: Tensor | None) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(weight.numel()))  # a vector: weight decay leaves those alone
        kept = torch.ones_like(weight, dtype=torch.bool) if kept is None else kept
        self.register_buffer("kept", kept, persistent=False)
        self.register_buffer("mask", kept.clone())

    def forward(self, weight: Tensor) -> Tensor:
        """The matrix that the model computes with."""
        masked: Tensor = _StraightThrough.apply(weight, self.scores, self.mask)
        return masked


def train(task: TrainTask, options: MovementOptions) -> Training:
    """What is trained: every weight, and a score for each in the matrices of the blocks."""
    task.model.requires_grad_(True)
    moving = []
    for name, module, own in list(matrices(task.model)):
        moving.append(Moving(module.get_parameter(own), task.kept.get(name)))
        parametrize.register_parametrization(module, own, moving[-1])
    objective = NextToken() if options.loss == "next-token" else MatchLogits(task.teacher())
    begin, last = round(options.begin * options.steps), max(1, round(options.until * options.steps))

    def after_step(done: int) -> None:
        if done > begin and (done == last or done % options.every == 0):
            narrow(moving, cubic(done - begin, last - begin, 0.0, options.sparsity), options.scope)

    rates = {"*.scores": options.score_rate / options.learning_rate}
    return Training(task.model, objective, after_step, finish=lambda: merge(task.model), rates=rates)


@torch.no_grad()
def narrow(moving: list[Moving], sparsity: float, scope: Literal["global", "layer"]) -> None:
    """Give every matrix the mask of its highest scores. What an earlier step removed counts, and stays gone."""
    groups = [moving] if scope == "global" else [[one] for one in moving]
    for group in groups:
        scores = torch.cat([one.scores for one in group])
        kept = torch.cat([one.kept.flatten() for one in group])
        masks = keep_largest(scores, dropped_of(len(scores), sparsity), kept)
        for one, mask in zip(group, masks.split([one.mask.numel() for one in group]), strict=True):
            one.mask.copy_(mask.view_as(one.mask))
