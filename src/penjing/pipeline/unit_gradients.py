"""Scores of units that need gradients of the loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from penjing.methods.pruning.attention_heads import gates
from penjing.methods.pruning.taylor import WeightGradients
from penjing.methods.pruning.unit_scores import UnitScore
from penjing.methods.pruning.units import UnitGradients
from penjing.models import find
from penjing.models.couplings import Coupling
from penjing.pipeline.block_cut import BlockWeights
from penjing.pipeline.stream import StreamedModel
from penjing.pipeline.weight_gradients import Windows, backward, over_windows
from penjing.progress import Progress

Chosen = Sequence[tuple[Coupling, int]]
"""Couplings of a block, each with the number of units that stay."""


def gradient_scores(
    stream: StreamedModel,
    tokens: Tensor,
    chosen: Sequence[Chosen],
    weights: Sequence[BlockWeights],
    score: UnitScore,
    progress: Progress,
) -> list[dict[str, Tensor]]:
    """Scores of the units of every block, by the name of the linear that reads them, on token windows (S, T)."""
    scores: list[dict[str, Tensor]] = [{} for _ in chosen]
    linears = [
        list(dict.fromkeys(name for coupling, _ in part for name in (coupling.consumer, *coupling.rows)))
        for part in chosen
    ]

    def take(index: int, block: nn.Module, windows: Windows) -> None:
        units = _BlockUnits(chosen[index], weights[index])
        known = {name: find(block, name).get_parameter("weight") for name in linears[index]}
        means = over_windows(map(units.watch, windows), known)
        scores[index] = units.scores(score, means, len(tokens))

    backward(stream, tokens, linears, take, progress)
    return scores


class _BlockUnits:
    """The units of one block, from gradients by whole weights."""

    def __init__(self, chosen: Chosen, weights: BlockWeights) -> None:
        self._chosen, self._weights = chosen, weights
        self._units = {coupling.consumer: weights.units(coupling) for coupling, _ in chosen}
        self._gates = {coupling.consumer: torch.zeros(coupling.units) for coupling, _ in chosen}

    def watch(self, found: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Add the gradients by gates of one window, and pass it on."""
        for coupling, _ in self._chosen:
            if (part := found.get(coupling.consumer)) is not None:
                columns = self._columns(coupling, part)
                self._gates[coupling.consumer] += gates(self._units[coupling.consumer].columns, columns).abs()
        return found

    def scores(self, score: UnitScore, means: Mapping[str, WeightGradients], windows: int) -> dict[str, Tensor]:
        """Of every coupling, by its consumer."""
        result = {}
        for coupling, count in self._chosen:
            own = means[coupling.consumer]
            makers = {name: means[name] for name in coupling.rows}
            squares = self._rows(coupling, {name: mean.square for name, mean in makers.items()})
            gradients = UnitGradients(
                columns=self._columns(coupling, own.mean),
                rows=self._rows(coupling, {name: mean.mean for name, mean in makers.items()}),
                squares=(self._columns(coupling, own.square), *squares),
                gates=self._gates[coupling.consumer] / windows,
            )
            units = replace(self._units[coupling.consumer], gradients=gradients)
            result[coupling.consumer] = score.function(units, coupling.units - count)
        return result

    def _oriented(self, name: str, tensor: Tensor) -> Tensor:
        return tensor.T if self._weights.specs[name].transposed else tensor

    def _columns(self, coupling: Coupling, gradient: Tensor) -> Tensor:
        count, size = coupling.columns.shape
        picked = self._oriented(coupling.consumer, gradient)[:, coupling.columns.flatten()]
        return picked.reshape(-1, count, size).permute(1, 0, 2)

    def _rows(self, coupling: Coupling, gradients: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return tuple(
            self._oriented(name, gradients[name])[index.flatten()].reshape(coupling.units, index.shape[1], -1)
            for name, index in coupling.rows.items()
        )
