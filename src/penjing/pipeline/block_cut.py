"""Cutting one block: which units stay, what the linear after them becomes, and the tensors that are left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from penjing.methods.pruning.attention_heads import entropy, of_groups
from penjing.methods.pruning.flap import compensation
from penjing.methods.pruning.refit import refit, refit_with_bias
from penjing.methods.pruning.unit_scores import UnitScore
from penjing.methods.pruning.units import Units, kept_units
from penjing.models import find
from penjing.models.couplings import Coupling
from penjing.models.layout import ModuleSpec
from penjing.models.narrowing import sliced, stays
from penjing.pipeline.observe import Observer
from penjing.statistics import Gram, Mean, Statistic, Statistics, StatisticType

Forwards = Callable[[Mapping[str, Tensor]], Iterable[Callable[[], object]]]
"""The forward passes of the block over all batches, with other values for some parameters."""


class BlockWeights:
    """The dense tensors of one block, by module name inside it."""

    def __init__(self, modules: Sequence[ModuleSpec], prefix: str, load: Callable[[str], Tensor]) -> None:
        self.specs = {spec.name.removeprefix(prefix): spec for spec in modules if spec.tensors}
        self._load = load

    def stored(self, name: str) -> dict[str, Tensor]:
        """A module's tensors as they lie on disk."""
        spec = self.specs[name]
        return {key: self._load(full) for key, full in zip(spec.tensors, spec.tensor_names(), strict=True)}

    def matrix(self, name: str) -> Tensor:
        """A linear's weight, fp32 (outputs, inputs)."""
        weight = self._load(f"{self.specs[name].name}.weight").float()
        return weight.T.contiguous() if self.specs[name].transposed else weight

    def units(self, coupling: Coupling) -> Units:
        """The weights of a coupling, unit by unit."""
        count, size = coupling.columns.shape
        weight = self.matrix(coupling.consumer)[:, coupling.columns.flatten()]
        rows = tuple(
            self.matrix(name)[index.flatten()].view(count, index.shape[1], -1) for name, index in coupling.rows.items()
        )
        return Units(weight.view(-1, count, size).permute(1, 0, 2), rows)


class BlockCut:
    """One block on the way to fewer units.

    score    of units; not called for couplings whose scores are `given`, by the name of their consumer
    refits   whether the linear after the units is refitted
    biased   whether it gets a bias with the mean of what goes
    """

    def __init__(
        self, weights: BlockWeights, score: UnitScore, given: Mapping[str, Tensor], *, refits: bool, biased: bool
    ) -> None:
        self._weights, self._score, self._given = weights, score, given
        self._refits, self._biased = refits, biased
        self._changed: dict[str, dict[str, Tensor]] = {}
        self._sides: list[tuple[str, Tensor | None, Tensor | None]] = []

    def remove(
        self, block: nn.Module, forwards: Forwards, couplings: Sequence[Coupling], counts: Sequence[int]
    ) -> None:
        """Keep `counts` units of each of `couplings`, judged in the block as it is by now."""
        consumers = [coupling.consumer for coupling in couplings]
        looks = self._refits or self._biased or self._score.looks_at == "inputs"
        seen = observe(block, forwards(self._parameters()), consumers) if looks else {}
        if looks and (unseen := [coupling for coupling in couplings if coupling.consumer not in seen]):
            seen |= {coupling.consumer: _independent(coupling) for coupling in unseen}
        focus = entropies(block, forwards(self._parameters()), consumers) if self._score.looks_at == "attention" else {}
        for coupling, count in zip(couplings, counts, strict=True):
            drop = coupling.units - count
            found = _with_inputs(self._weights.units(coupling), coupling, seen.get(coupling.consumer))
            if coupling.consumer in focus:
                found = replace(found, entropy=of_groups(focus[coupling.consumer], coupling.units))
            score = self._given.get(coupling.consumer)
            kept = kept_units(self._score.function(found, drop) if score is None else score, drop)
            self._changed[coupling.consumer] = self._consumer(coupling, kept, seen.get(coupling.consumer))
            self._sides += stays(coupling, kept)

    def tensors(self, zeros: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
        """What is left, by full name and as stored; with zeros of the given shapes for tensors that are new."""
        stored = {name: self._weights.stored(name) | self._changed.get(name, {}) for name in self._weights.specs}
        for name, rows, columns in self._sides:
            stored[name] = sliced(self._weights.specs[name], stored[name], rows, columns)
        full = {
            f"{self._weights.specs[name].name}.{key}".removesuffix("."): tensor
            for name, tensors in stored.items()
            for key, tensor in tensors.items()
        }
        return {name: torch.zeros(shape) for name, shape in zeros.items() if name not in full} | full

    def _consumer(self, coupling: Coupling, kept: Tensor, seen: Statistics | None) -> dict[str, Tensor]:
        """The linear after the units, still with all its columns; those that go are zero."""
        columns = coupling.columns[kept].flatten().sort().values
        weight, bias = self._weights.matrix(coupling.consumer), self._weights.stored(coupling.consumer).get("bias")
        new = weight[:, columns]
        if seen is not None and self._biased:
            gone = torch.ones(weight.shape[1], dtype=torch.bool).index_fill_(0, columns, False).nonzero().flatten()
            bias = compensation(weight, gone, seen[Mean].value) + (0 if bias is None else bias.float())
        elif seen is not None and self._refits and bias is not None:
            gram = seen[Gram]
            new, bias = refit_with_bias(weight, bias, gram.value, seen[Mean].value, gram.tokens, columns)
        elif seen is not None and self._refits:
            new = refit(weight, seen[Gram].value, columns)
        masked = torch.zeros_like(weight).index_copy_(1, columns, new)
        transposed = self._weights.specs[coupling.consumer].transposed
        result = {"weight": masked.T.contiguous() if transposed else masked}
        return result if bias is None else result | {"bias": bias}

    def _parameters(self) -> dict[str, Tensor]:
        return {f"{name}.{key}": tensor for name, tensors in self._changed.items() for key, tensor in tensors.items()}


def _independent(coupling: Coupling) -> Statistics:
    """Statistics of inputs that no calibration token reached (an expert's): as if they were independent."""
    width = coupling.columns.numel()
    found: dict[StatisticType, Statistic] = {kind: kind(width) for kind in (Gram, Mean)}
    found[Gram].update(torch.eye(width))
    return found


def _with_inputs(units: Units, coupling: Coupling, seen: Statistics | None) -> Units:
    if seen is None:
        return units
    order = coupling.columns.flatten()
    gram = seen[Gram]
    return replace(units, gram=gram.value[order][:, order], mean=seen[Mean].value[order], tokens=max(gram.tokens, 1))


@torch.no_grad()
def observe(
    block: nn.Module, forwards: Iterable[Callable[[], object]], linears: Sequence[str]
) -> dict[str, Statistics]:
    """Gram matrix and mean of the inputs of linears. One that no token reached is left out."""
    with Observer(block, find, dict.fromkeys(linears, (Gram, Mean))) as observer:
        for forward in forwards:
            with observer.forward():
                forward()
    return dict(observer.statistics)


@torch.no_grad()
def entropies(block: nn.Module, forwards: Iterable[Callable[[], object]], linears: Sequence[str]) -> dict[str, Tensor]:
    """Mean entropy of the attention whose outputs each linear reads: fp64 (query heads,)."""
    sums: dict[str, list[Tensor]] = {name: [] for name in linears}

    def hook(name: str) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        return lambda module, args, output: sums[name].append(entropy(output[1]))

    hooks = [find(block, name.rpartition(".")[0]).register_forward_hook(hook(name)) for name in linears]
    for forward in forwards:
        forward()
    for handle in hooks:
        handle.remove()
    return {name: torch.stack(parts).mean(0) for name, parts in sums.items()}
