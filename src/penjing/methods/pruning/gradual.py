"""Gradual pruning: train, and remove a few more of the smallest weights every few steps, on a cubic schedule.

    s_t = s_f + (s_i - s_f) (1 - (t - t0) / (t1 - t0))^3     for t0 <= t <= t1, then s_f

Most goes early, when much can be spared, and what is left has time to make up for what goes late. Masks only narrow. A
pruned weight stays zero: it has no gradient, and is put back after every step.

Worked example. s_i = 0, s_f = 0.8, t0 = 0, t1 = 10: s_5 = 0.8 (1 - 0.5^3) = 0.7, s_10 = 0.8.

Source: Zhu, Gupta 2017, "To prune, or not to prune" (arXiv:1710.01878), equation 1; magnitudes as in Han et al. 2015.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field

from penjing.methods.adaptation.recover import MatchLogits
from penjing.methods.pruning.scheduled import HeldMasks, inside
from penjing.methods.training import NextToken, Training, TrainOptions, TrainTask
from penjing.numerics.masks import dropped_of, keep_largest


class GradualOptions(TrainOptions):
    """Recipe keys of gradual pruning."""

    sparsity: float = Field(0.5, gt=0, lt=1, description="share of each matrix that is gone in the end")
    first: float = Field(0.0, ge=0, lt=1, description="share that goes at once")
    until: float = Field(0.7, gt=0, le=1, description="share of the steps after which nothing more is removed")
    every: int = Field(10, ge=1, description="steps between two removals")
    loss: Literal["logits", "next-token"] = Field("logits", description="the teacher's distribution, or the text")
    learning_rate: float = Field(3e-5, gt=0, description="at its highest")


def cubic(step: int, last: int, first: float, final: float) -> float:
    """Sparsity after `step` steps of a schedule that ends at `last`."""
    left = max(0.0, 1 - step / max(last, 1))
    return final + (first - final) * left**3


def train(task: TrainTask, options: GradualOptions) -> Training:
    """What is trained: everything, held to masks that narrow."""
    task.model.requires_grad_(True)
    objective = NextToken() if options.loss == "next-token" else MatchLogits(task.teacher())
    masks = HeldMasks(objective, inside(task), task.kept)
    last = max(1, round(options.until * options.steps))

    def after_step(done: int) -> None:
        if done == last or (done < last and done % options.every == 0):
            remove_smallest(masks, cubic(done, last, options.first, options.sparsity))
        masks.apply_masks()

    return Training(task.model, masks, after_step)


@torch.no_grad()
def remove_smallest(masks: HeldMasks, sparsity: float) -> None:
    """Narrow every mask to the largest weights of its matrix."""
    for name, parameter in masks.held.items():
        scores, kept = parameter.abs().reshape(1, -1), masks.mask(name).reshape(1, -1)
        narrower = keep_largest(scores, dropped_of(scores.shape[1], sparsity), kept)
        masks.narrow(name, narrower.reshape(parameter.shape))
