"""Scores of units that need gradients of the loss: one pass forward and one back, a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from penjing.methods.pruning.attention_heads import gates
from penjing.methods.pruning.unit_scores import UnitScore
from penjing.methods.pruning.units import UnitGradients
from penjing.models import find
from penjing.models.couplings import Coupling
from penjing.pipeline.block_cut import BlockWeights
from penjing.pipeline.gradients import block_inputs
from penjing.pipeline.stream import StreamedModel

Chosen = Sequence[tuple[Coupling, int]]
"""Couplings of a block, each with the number of units that stay."""


def gradient_scores(
    stream: StreamedModel,
    tokens: Tensor,
    chosen: Sequence[Chosen],
    weights: Sequence[BlockWeights],
    score: UnitScore,
    progress: Callable[[str, int, int, str], None],
) -> list[dict[str, Tensor]]:
    """Scores of the units of every block, by the name of the linear that reads them.

    The loss is the negative log-likelihood of each token window (S, T), mean over its tokens. The inputs of all
    blocks are in memory at once, blocks one at a time.
    """
    blocks = stream.layout.blocks
    inputs, states = block_inputs(stream, tokens, progress)
    flowing = _by_last_states(stream, tokens, states)
    scores: list[dict[str, Tensor]] = [{} for _ in range(blocks)]
    for index in reversed(range(blocks)):
        progress("gradients", 2 * blocks - 1 - index, 2 * blocks, stream.layout.block_name(index))
        with stream.block(index, torch.float32) as block:
            back = _BlockBack(stream, block, index, chosen[index], weights[index])
            back.run(inputs.pop(), flowing)
            scores[index] = back.scores(score)
    progress("gradients", 2 * blocks, 2 * blocks, "")
    return scores


def _by_last_states(stream: StreamedModel, tokens: Tensor, states: Tensor) -> Tensor:
    """Gradient of each window's loss by the states (S, T, D) after the last block."""
    gradient = torch.empty_like(states)
    with stream.head(torch.float32) as logits:
        for window, ids, place in zip(states, tokens, gradient, strict=True):
            leaf = window.unsqueeze(0).detach().requires_grad_()
            loss = nn.functional.cross_entropy(logits(leaf)[:-1], ids[1:])
            place.copy_(torch.autograd.grad(loss, leaf)[0][0])
    return gradient


class _BlockBack:
    """Gradients by the weights of one block's couplings, summed over windows."""

    def __init__(
        self, stream: StreamedModel, block: nn.Module, index: int, chosen: Chosen, weights: BlockWeights
    ) -> None:
        self._stream, self._block, self._index = stream, block, index
        self._chosen, self._weights = chosen, weights
        names = dict.fromkeys(name for coupling, _ in chosen for name in (coupling.consumer, *coupling.rows))
        self._leaves = {f"{name}.weight": self._leaf(name) for name in names}
        self._sum = {name: torch.zeros_like(leaf) for name, leaf in self._leaves.items()}
        self._squares = {name: torch.zeros_like(leaf) for name, leaf in self._leaves.items()}
        self._units = {coupling.consumer: weights.units(coupling) for coupling, _ in chosen}
        self._gates = {coupling.consumer: torch.zeros(coupling.units) for coupling, _ in chosen}
        self._windows = 0

    def _leaf(self, name: str) -> Tensor:
        weight = find(self._block, name).weight
        assert isinstance(weight, Tensor)
        return weight.detach().requires_grad_()

    def run(self, inputs: Tensor, flowing: Tensor) -> None:
        """Take in all windows: inputs (S, T, D), and the gradient by the outputs, which becomes that by the inputs."""
        for window, gradient in zip(inputs.split(1), flowing.split(1), strict=True):
            leaf = window.detach().requires_grad_()
            output = self._stream.run_with(self._block, self._index, leaf, self._leaves)
            found = torch.autograd.grad(output, [leaf, *self._leaves.values()], gradient.clone(), allow_unused=True)
            gradient.copy_(found[0])
            by_name = dict(zip(self._leaves, found[1:], strict=True))
            for name, part in by_name.items():
                if part is not None:
                    self._sum[name] += part
                    self._squares[name] += part.square()
            for coupling, _ in self._chosen:
                part = by_name[f"{coupling.consumer}.weight"]
                if part is not None:
                    columns = self._columns(coupling, part)
                    self._gates[coupling.consumer] += gates(self._units[coupling.consumer].columns, columns).abs()
            self._windows += 1

    def scores(self, score: UnitScore) -> dict[str, Tensor]:
        """Of every coupling, by its consumer."""
        result = {}
        for coupling, count in self._chosen:
            gradients = UnitGradients(
                columns=self._columns(coupling, self._mean(self._sum, coupling.consumer)),
                rows=self._rows(coupling, self._sum),
                squares=(
                    self._columns(coupling, self._mean(self._squares, coupling.consumer)),
                    *self._rows(coupling, self._squares),
                ),
                gates=self._gates[coupling.consumer] / self._windows,
            )
            units = replace(self._units[coupling.consumer], gradients=gradients)
            result[coupling.consumer] = score.function(units, coupling.units - count)
        return result

    def _mean(self, sums: Mapping[str, Tensor], name: str) -> Tensor:
        return sums[f"{name}.weight"] / self._windows

    def _oriented(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.T if self._weights.specs[name].transposed else tensor

    def _columns(self, coupling: Coupling, gradient: Tensor) -> Tensor:
        count, size = coupling.columns.shape
        picked = self._oriented(coupling.consumer, gradient)[:, coupling.columns.flatten()]
        return picked.reshape(-1, count, size).permute(1, 0, 2)

    def _rows(self, coupling: Coupling, sums: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(
            self._oriented(name, self._mean(sums, name))[index.flatten()].reshape(coupling.units, index.shape[1], -1)
            for name, index in coupling.rows.items()
        )
