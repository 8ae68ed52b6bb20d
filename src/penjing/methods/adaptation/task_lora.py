"""LoRA as a step: teach a model a text, or pairs, by changes of low rank, and hand it on with the changes merged.

    W' = Q + s B A          LoRA, rsLoRA       s = alpha / r, alpha / sqrt(r)      B (N, r), A (r, K)
    W' = m (Q + s B A) / |Q + s B A|           DoRA: m (N,) first |Q|, norms over the inputs, constant in the gradient
    minimise   mean of -log q(next token),     or KL to a teacher

Q is W itself, or W rounded to NF4 in blocks of 64 with double-quantised scales, held as codes (`base: nf4`, QLoRA).
B is first zero and A random, or B A begins with what rounding lost (`start: residual`), or Q and B A are found in
turns, so that Q + s B A begins close to W (`start: loftq`). Weights that were zero when it begins, because an earlier
step pruned them, are zero when it ends.

What is handed on is dense, and is what was trained: Q's values with the change in them, which lie on no grid. Quantise
in a later step; or, to keep codes and change apart, train an adapter on a finished model (`penjing adapter train`).

Worked example. W = [[1, 0]], B = [[2]], A = [[3, 5]], s = 1/2: W' = [[4, 5]]; with m = 1 and DoRA [[4, 5]] / sqrt(41).

Source: Hu et al. 2021 (arXiv:2106.09685); Kalajdzievski 2023, rsLoRA (arXiv:2312.03732); Liu et al. 2024, DoRA
(arXiv:2402.09353), section 4; Dettmers et al. 2023, QLoRA (arXiv:2305.14314); Li et al. 2023, LoftQ (arXiv:2310.08659).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from penjing.methods.adaptation.coded_base import CodedLinear, put
from penjing.methods.adaptation.low_rank_change import Directed, LowRankChange, attach, matrices, merge, scale_of
from penjing.methods.adaptation.recover import MatchLogits
from penjing.methods.adaptation.residual import loftq, residual_change
from penjing.methods.quantization.rtn import rtn
from penjing.methods.training import NextToken, Training, TrainOptions, TrainTask
from penjing.models.layout import Layout
from penjing.numerics.float_grids import FloatGrid
from penjing.representations import Masked, Quantized

NF4 = FloatGrid("nf4", 64, "nested")


class LoRAOptions(TrainOptions):
    """Recipe keys of LoRA."""

    base: Literal["dense", "nf4"] = Field("dense", description="weights as they are, or rounded to NF4 first (QLoRA)")
    start: Literal["zero", "residual", "loftq"] = Field(
        "zero", description="changes begin with nothing, what NF4 lost, or codes and changes found in turns"
    )
    rank: int = Field(16, ge=1, description="of the change of each matrix")
    alpha: float = Field(32.0, gt=0, description="its scale: alpha / rank")
    rank_stabilised: bool = Field(False, description="scale by alpha / sqrt(rank) instead (rsLoRA)")
    magnitudes: bool = Field(False, description="train the norm of each row apart from its direction (DoRA)")
    loss: Literal["next-token", "logits"] = Field("next-token", description="the text, or the teacher's distribution")
    learning_rate: float = Field(2e-4, gt=0, description="at its highest")

    @model_validator(mode="after")
    def _something_is_lost(self) -> Self:
        if self.base == "dense" and self.start != "zero":
            raise ValueError(f"`start: {self.start}` is about what rounding loses; it goes with `base: nf4`")
        return self

    def trained(self, layout: Layout) -> int:
        inside = (module for module in layout.modules if module.block is not None and module.kind == "linear")
        magnitudes = 1 if self.magnitudes else 0
        return sum(self.rank * sum(module.shape) + magnitudes * module.shape[0] for module in inside)


class Beginning(NamedTuple):
    """Where a matrix begins: its codes, and B (N, r) and A (r, K), None for the usual ones."""

    coded: Quantized | Masked
    change: tuple[Tensor, Tensor] | None


def beginning(weight: Tensor, kept: Tensor | None, options: LoRAOptions) -> Beginning:
    """Codes of a weight (N, K) fp32, zero outside `kept`, and the change that makes up for them."""

    def code(values: Tensor) -> Quantized | Masked:
        return rtn(values, NF4, kept=kept)

    if options.start == "loftq":
        up, down = loftq(weight, lambda values: code(values).dense(), options.rank)
        return Beginning(code(weight - up @ down), (up, down))
    coded = code(weight)
    lost = weight - coded.dense()
    return Beginning(coded, residual_change(lost, options.rank) if options.start == "residual" else None)


def train(task: TrainTask, options: LoRAOptions) -> Training:
    """The method's `train` shape."""
    scale = scale_of(options.alpha, options.rank, options.rank_stabilised)
    coded: list[str] = []
    for name, module, own in list(matrices(task.model)):
        weight, kept = module.get_parameter(own), task.kept.get(name)
        transposed = type(module).__name__ == "Conv1D"
        begun = _rounded(weight, kept, options, transposed) if _is_rounded(module, options) else []
        if options.magnitudes:
            change: LowRankChange = Directed(weight, options.rank, scale, kept, axis=-2 if transposed else -1)
        else:
            change = LowRankChange(weight, options.rank, scale, kept)
        _start(change, begun, transposed)
        if isinstance(change, Directed):
            change.measure(weight)
        if begun and isinstance(module, nn.Linear) and change.beside:
            [first] = begun
            assert isinstance(first.coded, Quantized)
            bias = None if module.bias is None else module.bias.detach()
            module = CodedLinear(first.coded, bias)
            coded.append(name.removesuffix(".weight"))
            put(task.model, coded[-1], module)
        attach(module, own, change)
    objective = NextToken() if options.loss == "next-token" else MatchLogits(task.teacher())

    def finish() -> nn.Module:
        for name in coded:
            linear = task.model.get_submodule(name)
            assert isinstance(linear, CodedLinear)
            plain = linear.dense()
            [change] = linear.children()
            plain.weight.data = change(plain.weight).detach()
            put(task.model, name, plain)
        return merge(task.model)

    return Training(task.model, objective, finish=finish)


def _is_rounded(module: nn.Module, options: LoRAOptions) -> bool:
    """Routers of experts stay dense: a rounded router sends tokens elsewhere."""
    return options.base == "nf4" and "Router" not in type(module).__name__


@torch.no_grad()
def _rounded(weight: Tensor, kept: Tensor | None, options: LoRAOptions, transposed: bool) -> list[Beginning]:
    """Put a parameter's rounded values in its place; how each of its matrices (N, K) begins."""
    turn = (lambda part: part.mT) if transposed else (lambda part: part)
    rows = turn(weight).flatten(0, -3) if weight.ndim > 2 else turn(weight)[None]
    masks = [None] * len(rows) if kept is None else list(turn(kept).reshape(rows.shape))
    begun = [beginning(part.float(), mask, options) for part, mask in zip(rows, masks, strict=True)]
    values = torch.stack([each.coded.dense() for each in begun])
    weight.copy_(turn(values).reshape(weight.shape))
    return begun


@torch.no_grad()
def _start(change: LowRankChange, begun: list[Beginning], transposed: bool) -> None:
    """Let a change begin as `begun` says."""
    rank = change.up.shape[-1]
    found = [each.change for each in begun if each.change is not None]
    if not found:
        return
    up = torch.stack([left[:, :rank] for left, _ in found])
    down = torch.stack([right[:rank] for _, right in found])
    if transposed:
        up, down = down.mT, up.mT
    change.up.copy_((up / change.scale).reshape(change.up.shape))
    change.down.copy_(down.reshape(change.down.shape))
