"""LoRAPrune: train low-rank changes, and let their gradients alone say which heads and neurons go meanwhile.

The gradient of a whole matrix is never computed. With W' = W + s B A, a step of B and A changes their product by

    g = dB A + B dA - dB dA          dB, dA the gradients of B (N, r) and A (r, K)

(up to the rate), which stands for the gradient of W'. A weight matters by |g W'|; a unit by the sum over its weights in
each linear that is coupled, where the scores of a linear are divided by their Euclidean norm before linears are added.
A moving average over steps follows:  S <- c S + (1 - c) S_now.

Every few steps the units with the lowest S of a block are masked, W' * M, more of them on the cubic schedule, until as
many stay as the result has. What then is merged is (W + s B A) * M, of which the units that are zero are removed.

Worked example. B = [1], A = [1, 0], dB = [2], dA = [0, 3]: g = [2, 0] + [0, 3] - [0, 6] = [2, -3].

Source: Zhang et al. 2023, "LoRAPrune: Structured Pruning Meets Low-Rank Parameter-Efficient Fine-Tuning"
(arXiv:2305.18403), eq. 8-11; magnitudes and norms as in the code that its authors published. They leave the first and
last blocks as they are, which gives blocks different widths; config.json has one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from penjing.methods.adaptation.low_rank_change import LowRankChange, attach, matrices, merge, scale_of
from penjing.methods.adaptation.recover import MatchLogits
from penjing.methods.pruning.cut import SizeOptions, UnitCut, kept_of, kinds_of, narrow_config
from penjing.methods.pruning.gradual import cubic
from penjing.methods.pruning.unit_scores import SCORES
from penjing.methods.training import Batch, Loss, NextToken, Objective, TrainFunction, Training, TrainOptions, TrainTask
from penjing.models import layout_of
from penjing.models.build import build_meta
from penjing.models.couplings import Coupling, find_couplings
from penjing.models.layout import Layout
from penjing.numerics.masks import keep_largest


class LoRAPruneOptions(SizeOptions, TrainOptions):
    """Recipe keys of LoRAPrune."""

    heads: bool = Field(True, description="remove groups of attention heads")
    neurons: bool = Field(True, description="remove neurons of the MLP")
    rank: int = Field(8, ge=1, description="of the low-rank changes")
    alpha: float = Field(16.0, gt=0, description="their scale: alpha / rank")
    average: float = Field(0.9, ge=0, lt=1, description="share of the scores of before in the moving average")
    begin: float = Field(0.1, ge=0, lt=1, description="share of the steps before anything is masked")
    until: float = Field(0.7, gt=0, le=1, description="share of the steps after which the masks stay")
    every: int = Field(10, ge=1, description="steps between two masks")
    loss: Literal["logits", "next-token"] = Field("logits", description="the teacher's distribution, or the text")
    learning_rate: float = Field(3e-4, gt=0, description="at its highest")

    @model_validator(mode="after")
    def _is_possible(self) -> Self:
        if not (self.heads or self.neurons):
            raise ValueError("`heads` or `neurons` must be true, or there is nothing to remove")
        if self.begin >= self.until:
            raise ValueError(f"begin {self.begin} is not before until {self.until}")
        return self

    def trained(self, layout: Layout) -> int:
        inside = (module for module in layout.modules if module.block is not None and module.kind == "linear")
        return sum(self.rank * sum(module.shape) for module in inside)


@dataclass(frozen=True, kw_only=True)
class TrainedCut(UnitCut):
    """A cut of units that a training before it chose, masked, and made zero; `score` has to find the zeros again."""

    start: TrainFunction


def estimated_gradient(change: LowRankChange) -> Tensor:
    """g, shaped like the matrix, from the gradients of its low-rank change."""
    up, down = change.up, change.down
    assert up.grad is not None and down.grad is not None
    return up.grad @ down + (up - up.grad) @ down.grad


@dataclass(frozen=True)
class _Part:
    """One coupled linear of the live model: its weight as stored, the change, and where units lie in it.

    index  rows (U, n), or columns (U, S) where `reads`
    """

    weight: nn.Parameter
    change: LowRankChange
    index: Tensor
    reads: bool
    transposed: bool

    @property
    def axis(self) -> int:
        """Of the stored weight, along which the units lie."""
        return int(self.reads) ^ int(self.transposed)

    def scores(self) -> Tensor:
        """fp32 (U,), of norm one unless all are zero."""
        size = (estimated_gradient(self.change) * self.change(self.weight)).abs().sum(1 - self.axis)
        units = size[self.index].sum(1)
        return units / units.norm().clamp(min=torch.finfo(units.dtype).tiny)


class MaskedUnits(nn.Module):
    """The units of one coupling while they are judged.

    scores  fp32 (U,): the moving average
    gate    fp32 (K,): one or zero for each input of the linear that reads the units
    """

    scores: Tensor
    gate: Tensor

    def __init__(self, coupling: Coupling, parts: list[_Part], consumer: nn.Module) -> None:
        super().__init__()
        self.register_buffer("scores", torch.zeros(coupling.units))
        self.register_buffer("gate", torch.ones(coupling.columns.numel()))
        self._columns, self._parts = coupling.columns, parts
        self._hook = consumer.register_forward_pre_hook(lambda module, args: (args[0] * self.gate.to(args[0].dtype),))

    @torch.no_grad()
    def look(self, average: float) -> None:
        """Take in the gradients of one step."""
        now = torch.stack([part.scores() for part in self._parts]).sum(0)
        self.scores.mul_(average).add_(now, alpha=1 - average)

    @torch.no_grad()
    def mask(self, drop: int) -> None:
        """Mask the `drop` units with the lowest scores, and no others."""
        kept = keep_largest(self.scores, drop)
        self.gate[self._columns.flatten()] = kept.repeat_interleave(self._columns.shape[1]).to(self.gate.dtype)

    @torch.no_grad()
    def make_zero(self) -> None:
        """Put the mask into the merged weights."""
        self._hook.remove()
        gone = self.gate[self._columns[:, 0]] == 0
        for part in self._parts:
            part.weight.index_fill_(part.axis, part.index[gone].flatten(), 0.0)


class _Judged(nn.Module):
    """An objective, and the units whose masks and scores are saved with the run."""

    def __init__(self, objective: Objective, units: list[MaskedUnits]) -> None:
        super().__init__()
        self.objective = objective
        self.units = nn.ModuleList(units)

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        return self.objective(model, batch)


def train(task: TrainTask, options: LoRAPruneOptions) -> Training:
    """What is trained: low-rank changes of all matrices of the blocks, under masks that grow."""
    layout = layout_of(task.config)
    kept = kept_of(task.config, layout, options)
    changes: dict[str, tuple[nn.Parameter, LowRankChange]] = {}
    for name, module, own in list(matrices(task.model)):
        weight = module.get_parameter(own)
        change = LowRankChange(weight, options.rank, scale_of(options.alpha, options.rank), task.kept.get(name))
        changes[name] = weight, change
        attach(module, own, change)
    units, counts = [], []
    for index, block in enumerate(find_couplings(task.config, layout)):
        prefix = f"{layout.block_name(index)}."
        for coupling in (found for kind in kinds_of(options) for found in block.of(kind)):
            parts = [
                _Part(*changes[f"{prefix}{name}.weight"], where, reads, layout.by_name[prefix + name].transposed)
                for name, where, reads in _sides(coupling)
            ]
            units.append(MaskedUnits(coupling, parts, task.model.get_submodule(prefix + coupling.consumer)))
            counts.append(coupling.units - kept[coupling.kind, coupling.units])
    begin, last = round(options.begin * options.steps), max(1, round(options.until * options.steps))

    def after_step(done: int) -> None:
        for group in units:
            group.look(options.average)
        if begin < done <= last and (done == last or done % options.every == 0):
            for group, gone in zip(units, counts, strict=True):
                group.mask(int(gone * cubic(done - begin, last - begin, 0.0, 1.0) + 1e-6))

    def finish() -> nn.Module:
        model = merge(task.model)
        for group in units:
            group.make_zero()
        return model

    objective = NextToken() if options.loss == "next-token" else MatchLogits(task.teacher())
    return Training(task.model, _Judged(objective, units), after_step, finish=finish)


def _sides(coupling: Coupling) -> list[tuple[str, Tensor, bool]]:
    """Every linear of a coupling: its name, where the units lie in it, and whether it reads them."""
    makers = [(name, rows, False) for name, rows in coupling.rows.items()]
    return [(coupling.consumer, coupling.columns, True), *makers]


def _config(config: Mapping[str, Any], layout: Layout, options: LoRAPruneOptions) -> Mapping[str, Any]:
    """config.json of the model that is left. Raises PlanError, or ValueError naming what has no change of its own."""
    made = narrow_config(config, layout, options)
    live = {name for name, _ in build_meta(config).named_parameters()}
    for index, block in enumerate(find_couplings(config, layout)):
        for coupling in (found for kind in kinds_of(options) for found in block.of(kind)):
            for name, _, _ in _sides(coupling):
                full = f"{layout.block_name(index)}.{name}.weight"
                if full not in live:
                    raise ValueError(
                        f"{full} is no matrix of its own while {config['model_type']} is trained, so its units have "
                        "no low-rank change to be judged by; use `neurons: false`, or `method: llm-pruner`"
                    )
    return made


LORAPRUNE = TrainedCut(
    config=_config,
    keeps_zeros=lambda options: True,
    score=lambda options: SCORES["magnitude"],
    refit=lambda options: False,
    start=train,
)
"""The row of the method."""
