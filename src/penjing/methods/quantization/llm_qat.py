"""LLM-QAT: train with rounded weights, inputs and key-value cache, on text that the model itself wrote.

    W' = weights per group, symmetric min-max (or a learnt range, LSQ)       straight-through gradients
    x' = inputs of linears per token, K' and V' = keys and values per token, over all heads together
    minimise  mean over tokens of  KL(p || q)                p the dense model, q the model with all of these rounded

The names 4-8-4 and 4-8-16 are bits of weights, inputs and cache; 16 leaves them alone. Nothing needs data: a random
first token, three to five more greedily, so that the text begins sensibly, the rest sampled, so that it is diverse.
There is no loss on the next token: what was sampled is noise, the distribution behind it is not.

What is written are weights on their grid. `rtn` with the same bits and group size, `scale_rule: narrow`, finds exactly
these codes and scales, so the model that is exported is the one that was trained.

Keys and values are rounded where they enter attention, after the rotary embedding (the authors: before it), which is
where a cache holds them. Nothing is clipped: the authors' code stops gradients of inputs beyond 2.

Source: Liu et al. 2023, "LLM-QAT: Data-Free Quantization Aware Training" (arXiv:2305.17888), sections 2-3; learnt
ranges, Esser et al. 2020 (arXiv:1902.08153).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn.utils import parametrize

from penjing.methods.adaptation.recover import hold_zeros
from penjing.methods.base import GroupSize
from penjing.methods.distillation.objective import Distillation
from penjing.methods.distillation.self_written import SelfWritten
from penjing.methods.quantization.rounded_activations import Matrix, round_cache, round_linear_inputs
from penjing.methods.training import Training, TrainOptions, TrainTask
from penjing.models.layout import Layout
from penjing.numerics.fake_quantisation import first_reach, largest, learnt, rounded_to_range, snapped, stored


class LLMQATOptions(TrainOptions):
    """Recipe keys of LLM-QAT."""

    bits: int = Field(4, ge=2, le=8, description="of weights")
    group_size: GroupSize = Field("channel", description="consecutive inputs that share a scale; `channel`: the row")
    inputs: int = Field(8, ge=4, le=16, description="bits of the inputs of linears; 16: as they are")
    kv: int = Field(16, ge=2, le=16, description="bits of keys and values; 16: as they are")
    learnt_ranges: bool = Field(False, description="train the range of each group of weights too (LSQ)")
    storage: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="the type of the result, in which scales are stored: the recipe's `dtype`"
    )
    text: Literal["generated", "given"] = Field(
        "generated", description="train on what the dense model writes, or on the recipe's text (or `data`)"
    )
    pool: int = Field(256, ge=1, description="how many windows the dense model writes, each when first needed")
    learning_rate: float = Field(2e-5, gt=0, description="at its highest")

    @field_validator("group_size")
    @classmethod
    def _per_row(cls, value: GroupSize) -> GroupSize:
        if value == "tensor":
            raise ValueError("llm-qat rounds row by row; use a number or `channel`, not `tensor`")
        return value


class RoundedWeight(nn.Module):
    """The parametrisation of a weight: (..., N, K) in groups along K, or along N where it is stored transposed."""

    def __init__(
        self, weight: Tensor, bits: int, width: int | None, dtype: torch.dtype, ranges: bool, axis: int
    ) -> None:
        super().__init__()
        self.bits, self.width, self.dtype, self.axis = bits, width, dtype, axis
        self.reach = None
        if ranges:
            reaches = [first_reach(part, bits) for part in self._groups(weight)]
            self.reach = nn.ParameterList([nn.Parameter(reach) for reach in reaches])

    def forward(self, weight: Tensor) -> Tensor:
        """The values on the grid, in the dtype of the weight."""
        groups = self._groups(weight)
        if self.reach is None:
            return self._joined([rounded_to_range(part, self.bits, self.dtype) for part in groups])
        pairs = zip(groups, self.reach, strict=True)
        return self._joined([learnt(part, reach, self.bits, self.dtype) for part, reach in pairs])

    @torch.no_grad()
    def snapped(self, weight: Tensor) -> Tensor:
        """What to store."""
        parts = []
        for index, part in enumerate(self._groups(weight)):
            reach = largest(part)
            if self.reach is not None:
                reach = torch.minimum(self.reach[index].clamp(min=0), reach)
            parts.append(snapped(part, stored(reach, self.dtype), self.bits, self.dtype))
        return self._joined(parts)

    def _groups(self, weight: Tensor) -> list[Tensor]:
        """Whole groups as one tensor (..., N, G, width), then the shorter last one (..., N, 1, rest), if any."""
        weight = weight.movedim(self.axis, -1)
        columns = weight.shape[-1]
        width = min(self.width or columns, columns)
        whole = columns // width * width
        parts = [weight[..., :whole].unflatten(-1, (-1, width))]
        return parts if whole == columns else [*parts, weight[..., whole:].unsqueeze(-2)]

    def _joined(self, parts: list[Tensor]) -> Tensor:
        return torch.cat([part.flatten(-2) for part in parts], -1).movedim(-1, self.axis)


def round_weights(weights: Iterable[Matrix], options: LLMQATOptions, dtype: torch.dtype) -> None:
    """Let modules compute with rounded weights."""
    width = options.group_size if isinstance(options.group_size, int) else None
    for module, name in weights:
        weight = module.get_parameter(name)
        transposed = type(module).__name__ == "Conv1D"
        rounding = RoundedWeight(
            weight, options.bits, width, dtype, ranges=options.learnt_ranges, axis=0 if transposed else -1
        )
        parametrize.register_parametrization(module, name, rounding)


def matrices(model: nn.Module) -> list[Matrix]:
    """The weights that multiply hidden states inside the decoder blocks, routers of experts left out."""
    found = []
    for full, module in model.named_modules():
        in_block = any(part.isdigit() for part in full.split("."))
        if in_block and not isinstance(module, nn.Embedding) and "Router" not in type(module).__name__:
            own = module.named_parameters(recurse=False)
            found += [(module, name) for name, value in own if value.ndim >= 2]
    return found


@torch.no_grad()
def on_the_grid(weights: Iterable[Matrix]) -> None:
    """Put the rounded weights in place of those that were trained; the modules are plain ones again."""
    for module, name in weights:
        chain: Any = module.parametrizations[name]  # type: ignore[index]
        values = chain[0].snapped(chain.original)
        parametrize.remove_parametrizations(module, name, leave_parametrized=False)
        module.get_parameter(name).copy_(values)


def config_of(config: Mapping[str, Any], layout: Layout, options: LLMQATOptions) -> Mapping[str, Any]:
    """config.json of the result, which is the one before. Raises ValueError when scales would be of another type."""
    dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if dtype != options.storage:
        raise ValueError(f"the model is stored in {dtype} and so will its scales be; set `storage: {dtype}`")
    return config


def train(task: TrainTask, options: LLMQATOptions) -> Training:
    """The method's `train` shape."""
    teacher = task.teacher()
    task.model.requires_grad_(True)
    hold_zeros(task)
    weights = matrices(task.model)
    ends = round_linear_inputs(weights, options.inputs) if options.inputs < 16 else []
    ends += [round_cache(task.model, options.kv)] if options.kv < 16 else []
    round_weights(weights, options, getattr(torch, options.storage))
    objective: nn.Module = Distillation(teacher)
    if options.text == "generated":
        objective = SelfWritten(objective, teacher, options.pool, options.seed)

    def finish() -> nn.Module:
        for end in ends:
            end()
        on_the_grid(weights)
        return task.model.requires_grad_(False)

    return Training(task.model, objective, finish=finish)
