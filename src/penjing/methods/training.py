"""What a method that trains a whole model gives to the one loop: an objective, and what may be trained.

    task      what the method sees: the model to train, a dense teacher, the masks of an earlier pruning
    objective (model, batch) -> Loss: a mean, over how many items it is one, and named parts for the log
    Training  the objective, what happens after each step, and how the result becomes a dense model again

Every parameter that requires a gradient is trained, in the model and in the objective, where the objective is a module
with parameters of its own (projections of hidden states, say). The loop is `penjing.training`; nothing here knows it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn import functional

from penjing.methods.base import Options, Remake
from penjing.models.layout import Layout

Batch = Mapping[str, Tensor]
"""Inputs of a model by the names of its forward's arguments.

input_ids       int64 (B, T)
attention_mask  int64 (B, T), 0 where a row is filled up; absent when no row is
labels          int64 (B, T), the input ids, and IGNORED where nothing is to be learnt (prompt, filling)
"""

IGNORED = -100
"""The label of a position that counts for nothing, as in transformers and torch's cross entropy."""


@dataclass(frozen=True)
class Loss:
    """What an objective says of a batch.

    value  scalar, the mean over `count` items; its gradient is taken
    count  items (tokens, pairs) behind the mean: micro-batches are weighed by it, so that a step's gradient is that of
           the mean over all items of the step, however they were split
    parts  more means for the log
    """

    value: Tensor
    count: int = 1
    parts: Mapping[str, Tensor] = field(default_factory=dict)


Objective = Callable[[nn.Module, Batch], Loss]
"""A function, or an `nn.Module` where it has parameters, buffers or a teacher of its own."""


@dataclass(frozen=True)
class TrainTask:
    """What a method that trains is given.

    model       the student in fp32, as the steps before left it; nothing requires a gradient yet
    teacher     loads the dense model that is to be matched; without gradients, in evaluation mode
    kept        bool (N, K) in the orientation of the live parameter, by parameter name: zeros elsewhere must stay zeros
    config      the model's config.json
    tokenizers  loads those of model and teacher
    """

    model: nn.Module
    teacher: Callable[[], nn.Module]
    kept: Mapping[str, Tensor] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    tokenizers: Callable[[], tuple[Any, Any]] = lambda: (None, None)


@dataclass(frozen=True)
class Training:
    """What a method asks of the loop.

    model       what the objective is called with: the task's model, or a wrapper around it
    objective   what is minimised
    after_step  called after each optimiser step with the number of steps done, for schedules and constraints; gradients
                are still there. What it remembers must be buffers of the objective, which are saved with the run
    finish      the dense model to write: adapters merged, wrappers taken off. In the form of the task's model
    rates       globs of parameter names -> factor on the learning rate; the first that fits holds
    repeats     how often the course begins again at step `rewind`: same data, same rates, fresh moments
    """

    model: nn.Module
    objective: Objective
    after_step: Callable[[int], None] = lambda done: None
    finish: Callable[[], nn.Module] | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    repeats: int = 0
    rewind: int = 0


PREVIOUS = "previous"
"""The name of the teacher that is the model which the step is given."""

TrainFunction = Callable[[TrainTask, Any], Training]
"""What to train, given a method's options."""


def _unchanged(config: Mapping[str, Any], layout: Layout, options: Any) -> Mapping[str, Any]:
    return config


@dataclass(frozen=True, kw_only=True)
class Trained(Remake):
    """The shape of a method that trains: the model it makes has other weights and, unless it says so, the same config.

    start  names what is trained and why
    """

    start: TrainFunction = field(kw_only=True)
    config: Callable[[Mapping[str, Any], Layout, Any], Mapping[str, Any]] = _unchanged
    keeps_zeros: Callable[[Any], bool] = lambda options: True


class TrainOptions(Options):
    """Recipe keys that every method on the one loop has."""

    steps: int = Field(100, ge=1, description="steps of the optimiser")
    batch_size: int = Field(8, ge=1, description="windows or pairs per step, over all devices")
    micro_batch: int = Field(1, ge=1, description="of those, how many go through the model at once")
    learning_rate: float = Field(1e-4, gt=0, description="at its highest")
    warm_up: float = Field(0.05, ge=0, lt=1, description="share of the steps in which the rate rises; then a cosine")
    weight_decay: float = Field(0.0, ge=0, description="of matrices; vectors are left alone")
    clip: float | None = Field(1.0, gt=0, description="largest norm of the gradient")
    optimizer: Literal["adamw", "adamw-8bit", "paged-adamw-8bit"] = Field(
        "adamw", description="moments in fp32, or in 8 bits (bitsandbytes), or those in memory that pages out"
    )
    gradient_checkpointing: bool = Field(False, description="compute activations twice instead of keeping them")
    save_every: int = Field(50, ge=1, description="steps between two points from which a killed run continues")
    seed: int = Field(0, ge=0, description="chooses batches, dropout and first values")
    data: str | None = Field(
        None, description="text or instruction pairs to train on, as `calibration: data`; default: the recipe's text"
    )
    samples: int | None = Field(None, ge=1, description="windows or pairs of `data`; default: all that `steps` need")
    length: int | None = Field(None, ge=2, description="tokens per window or pair; default: that of the recipe's text")
    teacher: str | None = Field(
        None, description="another model to learn from, or `previous`: the one at hand; default: the original"
    )

    def trained(self, layout: Layout) -> int:
        """Number of parameters that are trained, for the plan's memory."""
        return layout.parameters

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.batch_size % min(self.micro_batch, self.batch_size):
            raise ValueError(f"micro_batch {self.micro_batch} does not divide batch_size {self.batch_size}")
        if self.data is None and (self.samples or self.length):
            raise ValueError("`samples` and `length` go with `data`; the recipe's text has its own under `calibration`")
        return self


class Teacher(nn.Module):
    """A model that is asked and never changed: no gradients, evaluation mode whatever the objective around it does."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)

    def train(self, mode: bool = True) -> Self:
        """Stays in evaluation mode."""
        return self

    @torch.no_grad()
    def forward(self, batch: Batch, **arguments: Any) -> Any:
        """The model's own output for a batch; `arguments` such as `output_hidden_states` are passed on."""
        return run(self.model, batch, **arguments)


def run(model: nn.Module, batch: Batch, **arguments: Any) -> Any:
    """The output of a transformers model for a batch, without its own loss and without a cache."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return model(**inputs, **{"use_cache": False, **arguments})


def scored(batch: Batch) -> Tensor:
    """bool (B, T - 1): positions whose next token is to be learnt."""
    return batch["labels"][:, 1:] != IGNORED


def next_token(logits: Tensor, batch: Batch) -> Tensor:
    """Mean negative log-likelihood in nats of the tokens to be learnt, for logits (B, T, V)."""
    labels = batch["labels"][:, 1:]
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED)


class NextToken(nn.Module):
    """The objective of plain training: the negative log-likelihood of the next token."""

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """Its mean over the tokens to be learnt."""
        return Loss(next_token(run(model, batch).logits, batch), int(scored(batch).sum()))
