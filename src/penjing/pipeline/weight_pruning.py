"""Zeros in the linears of a whole model, by scores that gradients give: look, compare, write block by block."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from penjing.checkpoint import write_shard
from penjing.errors import CalibrationError
from penjing.methods.pruning.taylor import TaylorOptions, WeightGradients, keep, pruned_linears, scores
from penjing.models.layout import ModuleSpec
from penjing.numerics.masks import dropped_of
from penjing.numerics.ranking import GONE, masks, threshold
from penjing.pipeline.dense_writer import DenseWriter
from penjing.pipeline.stream import StreamedModel
from penjing.pipeline.weight_gradients import Windows, backward, over_windows
from penjing.pipeline.weights import Weights
from penjing.planning import storage_dtype

if TYPE_CHECKING:
    from penjing.pipeline.stages import RemakeTask


def prune_weights(task: RemakeTask) -> Mapping[str, Any]:
    """Write the model of `task.source` with zeros.

    Returns the share of each linear that is zero, and the linears (of experts) that no calibration token reached.
    """
    return _Pruner(task).run()


class _Pruner:
    """One model on the way to zeros. Scores of the whole model lie in files while they are compared."""

    def __init__(self, task: RemakeTask) -> None:
        assert isinstance(task.step.options, TaylorOptions)
        self.task, self.options = task, task.step.options
        self._layout = task.layout
        dtype = storage_dtype(task.source.config, task.recipe)
        self._writer = DenseWriter(task.directory, task.config, self._layout, dtype)
        self._blocks: dict[int, list[ModuleSpec]] = {index: [] for index in range(self._layout.blocks)}
        for spec in pruned_linears(self._layout, self.options):
            assert spec.block is not None
            self._blocks[spec.block].append(spec)
        self._folder = task.directory.parent / "scores"
        self._shares: dict[str, float] = {}
        self._unreached: list[str] = []

    def run(self) -> Mapping[str, Any]:
        """Score and write every block."""
        self._writer.write(0, partial(self._unchanged, None))
        if self.options.criterion == "magnitude":
            for index in self._blocks:
                self._scored(index, None)
        else:
            self._look()
        if self._compares_all:
            self._compare()
        for index, specs in self._blocks.items():
            if not specs:
                self._writer.write(index + 1, partial(self._unchanged, index))
        self._writer.finish(self.task.source.files())
        return {"zeros": dict(sorted(self._shares.items())), "unreached": sorted(self._unreached)}

    @property
    def _compares_all(self) -> bool:
        return self.options.scope == "global" and self.options.pattern is None

    def _look(self) -> None:
        """One pass there and back over the model."""
        task = self.task
        live = Weights(task.source, self._layout).live
        stream = StreamedModel(task.source.config, self._layout, live, trust_remote_code=task.trust_remote_code)
        linears = [[self._inside(spec) for spec in specs] for specs in self._blocks.values()]

        def take(index: int, block: nn.Module, windows: Windows) -> None:
            shapes = {self._inside(spec): torch.empty(spec.tensors["weight"]) for spec in self._blocks[index]}
            self._scored(index, over_windows(windows, shapes))

        backward(stream, task.tokens, linears, take, task.progress)

    def _scored(self, index: int, gradients: Mapping[str, WeightGradients] | None) -> None:
        """Write a block's zeros, or its scores where they are still to be compared with those of other blocks."""
        found, kept = {}, {}
        for spec in self._blocks[index]:
            weight = self._weight(spec)
            found[spec.name] = self._scores(spec, weight, gradients)
            kept[spec.name] = weight != 0
        if self._compares_all:
            marked = {name: score.where(kept[name], GONE).contiguous() for name, score in found.items()}
            self._folder.mkdir(exist_ok=True)
            write_shard(self._folder / f"{index}.safetensors", marked)
        elif found:
            self._write(index, {name: keep(score, self.options, kept[name]) for name, score in found.items()})

    def _scores(self, spec: ModuleSpec, weight: Tensor, gradients: Mapping[str, WeightGradients] | None) -> Tensor:
        """fp32 (N, K). A linear that no token reached is judged by magnitude, unless it competes with others."""
        if gradients is None:
            return scores(weight, None, "magnitude")
        given = _oriented(spec, gradients[self._inside(spec)])
        if not torch.isfinite(given.square).all():
            raise CalibrationError(
                f"the gradient of the loss by {spec.name} has NaN or infinite values: the model overflows in fp32, or "
                "its weights are damaged"
            )
        if not given.magnitude.any():
            self._unreached.append(spec.name)
            return scores(weight, given, "taylor" if self._compares_all else "magnitude")
        return scores(weight, given, self.options.criterion)

    def _compare(self) -> None:
        """All scores of the model against one threshold."""
        total = sum(spec.shape[0] * spec.shape[1] for specs in self._blocks.values() for spec in specs)
        cut = threshold(self._all_scores, dropped_of(total, self.options.sparsity or 0))
        for (index, specs), kept in zip(self._blocks.items(), masks(self._all_scores(), cut), strict=True):
            if specs:
                self._write(index, kept)
        shutil.rmtree(self._folder)

    def _all_scores(self) -> Iterator[dict[str, Tensor]]:
        for index, specs in self._blocks.items():
            yield load_file(self._folder / f"{index}.safetensors") if specs else {}

    def _write(self, index: int, kept: Mapping[str, Tensor]) -> None:
        """The shard of one block."""
        self._shares |= {name: round(1 - float(mask.double().mean()), 6) for name, mask in kept.items()}

        def make() -> Mapping[str, Tensor]:
            tensors = self._unchanged(index)
            for spec in self._blocks[index]:
                masked = self._weight(spec) * kept[spec.name]
                tensors[f"{spec.name}.weight"] = masked.T.contiguous() if spec.transposed else masked
            return tensors

        self._writer.write(index + 1, make)

    def _unchanged(self, index: int | None) -> dict[str, Tensor]:
        names = [name for spec in self._layout.of_block(index) for name in spec.tensor_names()]
        return {name: self.task.source.load(name) for name in names}

    def _weight(self, spec: ModuleSpec) -> Tensor:
        """fp32 (N, K)."""
        weight = self.task.source.load(f"{spec.name}.weight").float()
        return weight.T if spec.transposed else weight

    def _inside(self, spec: ModuleSpec) -> str:
        return spec.name.removeprefix(f"{self._layout.block_name(spec.block or 0)}.")


def _oriented(spec: ModuleSpec, given: WeightGradients) -> WeightGradients:
    if not spec.transposed:
        return given
    return WeightGradients(given.mean.T, given.magnitude.T, given.square.T)
