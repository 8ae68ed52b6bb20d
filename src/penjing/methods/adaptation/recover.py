"""Recovery: bring a compressed model back towards the dense one, by training on its logits.

    minimise  mean over tokens of  KL(p || q) = sum_v p_v (log p_v - log q_v)       p dense, q the model

over low-rank changes of all matrices of the blocks (merged at the end), or over every parameter. Weights that are zero
when it begins, because an earlier step pruned them, are zero when it ends. With `loss: next-token` there is no teacher.
The gradient of the model's logits is q - p.

Worked example. p = (1/2, 1/2), logits (log 3, 0), so q = (3/4, 1/4): KL = log(2 / sqrt(3)) = 0.1438, the gradient
(1/4, -1/4).

Source: Hinton et al. 2015 (arXiv:1503.02531) at temperature 1; as recovery after pruning Muralidharan et al. 2024
(arXiv:2407.14679), section 4, who found logits alone to do as well as logits and hidden states.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import nn

from penjing.methods.adaptation.low_rank_change import LowRankChange, attach, matrices, merge, scale_of
from penjing.methods.distillation.kl import forward_kl
from penjing.methods.training import Batch, Loss, NextToken, Teacher, Training, TrainOptions, TrainTask, run, scored
from penjing.models.layout import Layout


class RecoverOptions(TrainOptions):
    """Recipe keys of recovery."""

    what: Literal["lora", "full"] = Field("lora", description="low-rank changes, merged at the end, or every parameter")
    loss: Literal["logits", "next-token"] = Field("logits", description="the teacher's distribution, or the text")
    rank: int = Field(16, ge=1, description="of the low-rank changes")
    alpha: float = Field(32.0, gt=0, description="their scale: alpha / rank")
    rank_stabilised: bool = Field(False, description="scale by alpha / sqrt(rank) instead (rsLoRA)")
    learning_rate: float = Field(3e-4, gt=0, description="at its highest; `full` wants a tenth of it")

    def trained(self, layout: Layout) -> int:
        if self.what == "full":
            return layout.parameters
        inside = (module for module in layout.modules if module.block is not None and module.kind == "linear")
        return sum(self.rank * sum(module.shape) for module in inside)


class MatchLogits(nn.Module):
    """The objective: KL to a teacher's next-token distribution, at the positions whose next token counts."""

    def __init__(self, teacher: nn.Module) -> None:
        super().__init__()
        self.teacher = Teacher(teacher)

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Its mean over those positions."""
        at = scored(batch)
        dense = self.teacher(batch).logits[:, :-1][at]
        count = int(at.sum())
        value = forward_kl(run(model, batch).logits[:, :-1][at], dense).sum() / max(count, 1)
        return Loss(value, count)


def train(task: TrainTask, options: RecoverOptions) -> Training:
    """The method's `train` shape."""
    if options.what == "lora":
        scale = scale_of(options.alpha, options.rank, options.rank_stabilised)
        for name, module, own in list(matrices(task.model)):
            weight = getattr(module, own)
            attach(module, own, LowRankChange(weight, options.rank, scale, task.kept.get(name)))
    else:
        task.model.requires_grad_(True)
        hold_zeros(task)
    objective = NextToken() if options.loss == "next-token" else MatchLogits(task.teacher())
    return Training(task.model, objective, finish=lambda: merge(task.model))


def hold_zeros(task: TrainTask) -> None:
    """Take the gradient of pruned weights away, so that AdamW leaves them zero: no moment, and no decay of zero."""
    for name, parameter in task.model.named_parameters():
        kept = task.kept.get(name)
        if kept is not None:
            parameter.register_hook(lambda gradient, kept=kept: gradient * kept.to(gradient.device))
