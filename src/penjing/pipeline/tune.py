"""Training a finished model as a whole: its logits against the dense model's, its shards written anew.

The model is held in compact form, codes and dense tensors, and decoded block by block in the forward pass and again in
the backward pass, so that the memory for activations is that of one block. New shards are written beside the old ones
and replace them only when all are there: a killed run finds the old model or the new one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint as recomputed

from penjing.costs import BATCH_TOKENS
from penjing.methods.base import ModelTask, Tuned
from penjing.methods.distillation.kl import forward_kl
from penjing.models import find
from penjing.models.layout import ModuleSpec
from penjing.pipeline.journal import Journal
from penjing.pipeline.stream import StreamedModel, head_slices
from penjing.pipeline.weights import LiveModule, decode_module
from penjing.planning import Plan
from penjing.progress import Progress
from penjing.representations import Representation

Given = Callable[[str], Tensor | None]
"""Another value for a parameter, by its full name; None for the model's own."""


class FinishedModel:
    """The written shards of a run as a model that can be trained.

    teacher  the dense model, all its blocks and before any rewriting
    tokens   calibration windows (S, T)
    targets  its hidden states (S, T, D) after the last block, in the dtype of the arithmetic

    Losses are computed inside a `with` block, in which both heads are in memory.
    """

    def __init__(
        self,
        plan: Plan,
        config: Mapping[str, Any],
        teacher: StreamedModel,
        directory: Path,
        journal: Journal,
        tokens: Tensor,
        targets: Tensor,
        *,
        trust_remote_code: bool = False,
    ) -> None:
        self.plan, self.layout = plan, plan.layout
        self._directory = directory
        self._rows = {row.module.name: row for row in plan.rows}
        notes = {name: entry["notes"] for name, entry in journal.shards.items()}
        self._shard_of = {tensor: name for name, note in notes.items() for tensor in note["tensors"]}
        self._dense, self._tokens = teacher, tokens
        self._written = StreamedModel(config, plan.layout, self._live, trust_remote_code=trust_remote_code)
        self._targets = targets
        self._inputs = self._written.embed(tokens, targets.dtype)
        inside = [module for module in plan.layout.modules if module.block is not None]
        self.weights = {module.name: self._unpack(module) for module in inside if self._is_coded(module)}
        self.frozen = {
            name: self._load(name)
            for module in inside
            for key, name in zip(module.tensors, module.tensor_names(), strict=True)
            if not (key == "weight" and module.name in self.weights)
        }

    def __enter__(self) -> FinishedModel:
        self._stack = ExitStack()
        self._heads = [
            self._stack.enter_context(model.head(self._targets.dtype)) for model in (self._dense, self._written)
        ]
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def _is_coded(self, module: ModuleSpec) -> bool:
        return self._rows[module.name].scheme.grid is not None

    def _load(self, name: str) -> Tensor:
        with safe_open(self._directory / self._shard_of[name], "pt") as shard:
            return shard.get_tensor(name)

    def _unpack(self, module: ModuleSpec) -> Representation:
        row = self._rows[module.name]
        return self.plan.format_of(row).unpack(module, row.scheme, self._load)

    def _live(self, module: ModuleSpec, dtype: torch.dtype) -> LiveModule:
        return decode_module(module, self._rows[module.name].scheme, self.plan.format, self._load, dtype)

    def task(self, names: Sequence[str]) -> ModelTask:
        """What a method that trains gets to see when it may change the linears in `names`."""
        norms = [f"{module.name}.weight" for module in self.layout.modules if module.kind == "norm"]
        inside = [name for name in norms if name in self.frozen]
        return ModelTask(
            weights={name: self.weights[name] for name in names},
            norms={name: self.frozen[name].float() + self.layout.norm_offset for name in inside},
            windows=len(self._inputs),
            loss=partial(self._loss, self._against_dense),
            told=partial(self._loss, self._against_text),
            dtype=self._targets.dtype,
        )

    def _loss(self, loss: Callable[[int, slice, Tensor], Tensor], batch: Sequence[int], given: Given) -> float:
        """Mean in nats per token over some windows of a sum over logits; gradients go to the leaves behind `given`."""
        tokens = len(batch) * self._inputs.shape[1]
        together = max(1, BATCH_TOKENS // self._inputs.shape[1])
        parts = [batch[start : start + together] for start in range(0, len(batch), together)]
        return sum(self._send_back(loss, part, given, tokens) for part in parts)

    def _send_back(
        self, loss: Callable[[int, slice, Tensor], Tensor], windows: Sequence[int], given: Given, tokens: int
    ) -> float:
        """The part of some windows in a mean over `tokens`, and of its gradients."""
        _, head = self._heads
        states = self._inputs[list(windows)]
        for index in range(self.layout.blocks):
            states = recomputed(partial(self._block, index, given), states, use_reentrant=False)
        last, gradient, total = states.detach(), torch.empty_like(states), 0.0
        for row, window in enumerate(windows):
            for at in head_slices(last.shape[1]):
                leaf = last[row : row + 1, at].requires_grad_()
                value = loss(window, at, head(leaf)) / tokens
                gradient[row, at] = torch.autograd.grad(value, leaf)[0][0]
                total += value.item()
        states.backward(gradient)
        return total

    def _against_dense(self, window: int, at: slice, logits: Tensor) -> Tensor:
        """Sum of KL(dense || model) at some positions of a window."""
        return forward_kl(logits, self._heads[0](self._targets[window : window + 1, at])).sum()

    def _against_text(self, window: int, at: slice, logits: Tensor) -> Tensor:
        """Sum of the negative log-likelihoods of the tokens that follow them; the last position has none."""
        following = self._tokens[window, at.start + 1 : at.stop + 1].to(logits.device)
        return cross_entropy(logits[: len(following)], following, reduction="sum")

    def _block(self, index: int, given: Given, states: Tensor) -> Tensor:
        prefix = f"{self.layout.block_name(index)}."
        parameters = {}
        for module in self.layout.of_block(index):
            for key, name in zip(module.tensors, module.tensor_names(), strict=True):
                coded = key == "weight" and module.name in self.weights
                value = given(module.name if coded else name)
                if value is None:
                    value = self.weights[module.name].dense() if coded else self.frozen[name]
                elif not coded:
                    value = value - self.layout.norm_offset
                if coded and module.transposed:
                    value = value.T
                parameters[f"{module.name.removeprefix(prefix)}.{key}"] = value.to(states.dtype)
        block = find(self._written.model, self.layout.block_name(index))
        return self._written.run_with(block, index, states, parameters)

    def replaced(self, tuned: Tuned) -> dict[str, dict[str, Tensor]]:
        """The shards that `tuned` changes, by file name."""
        offset = self.layout.norm_offset
        changed = {name: (value - offset).to(self.frozen[name].dtype) for name, value in tuned.norms.items()}
        for name, weight in tuned.weights.items():
            row = self._rows[name]
            changed |= self.plan.format_of(row).pack(row.module, row.scheme, weight, self.plan.dtype)
        shards: dict[str, dict[str, Tensor]] = {}
        for shard in {self._shard_of[name] for name in changed}:
            old = load_file(self._directory / shard)
            shards[shard] = {name: changed.get(name, tensor) for name, tensor in old.items()}
        return shards


def tune(model: FinishedModel, journal: Journal, progress: Progress) -> None:
    """Run the recipe's steps that train the finished model, except those that an earlier run already did."""
    for number, step in enumerate(model.plan.recipe.steps):
        train = step.definition.tune
        if train is None or journal.is_tuned(number):
            continue
        names = [row.module.name for row in model.plan.rows if number in row.steps]
        steps = getattr(step.options, "iterations", 1)

        def report(done: int, loss: float, name: str = step.method, steps: int = steps) -> None:
            progress(name, done + 1, steps, f"loss {loss:.4f}")

        with model:
            tuned = train(model.task(names), step.options, report)
        journal.replace(number, model.replaced(tuned))
