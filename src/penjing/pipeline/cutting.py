"""Removing neurons and heads from every block of a model: observe, choose, refit, slice, write, go on.

Statistics of a block are taken where the blocks before it are already cut, and what follows a block runs on what its
file holds. A file that an interrupted run left is not made again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from penjing.methods.pruning.cut import UnitCut, kinds_of
from penjing.models import layout_of
from penjing.models.build import keep_probabilities
from penjing.models.couplings import Coupling, find_couplings
from penjing.models.narrowing import shapes
from penjing.pipeline.block_cut import BlockCut, BlockWeights
from penjing.pipeline.dense_writer import DenseWriter
from penjing.pipeline.stream import StreamedModel, batches
from penjing.pipeline.unit_gradients import gradient_scores
from penjing.pipeline.weights import Weights
from penjing.planning import storage_dtype

if TYPE_CHECKING:
    from penjing.pipeline.stages import RemakeTask


def cut_units(task: RemakeTask) -> Mapping[str, Any]:
    """Write the model of `task.config`, whose source has more units; returns how many of each kind stay."""
    return UnitCutter(task).run()


class UnitCutter:
    """One model on the way to fewer units.

    dense  the model as it was: blocks are observed and judged in it
    cut    the model as far as it is written: hidden states advance through it
    """

    def __init__(self, task: RemakeTask) -> None:
        self.task = task
        remake = task.step.definition.remake
        assert isinstance(remake, UnitCut)
        self._remake, self._options = remake, task.step.options
        self._score = remake.score(self._options)
        trust = task.trust_remote_code
        self._narrow = layout_of(task.config, trust_remote_code=trust)
        self._couplings = find_couplings(task.source.config, task.layout, trust_remote_code=trust)
        dtype = storage_dtype(task.source.config, task.recipe)
        self._writer = DenseWriter(task.directory, task.config, self._narrow, dtype)
        live = Weights(task.source, task.layout).live
        self.dense = StreamedModel(task.source.config, task.layout, live, trust_remote_code=trust)
        self.cut = StreamedModel(task.config, self._narrow, self._writer.live, trust_remote_code=trust)

    def run(self) -> Mapping[str, Any]:
        """Cut block after block."""
        task, blocks = self.task, self.task.layout.blocks
        if self._score.looks_at == "attention":
            keep_probabilities(self.dense.model)
        given: Sequence[Mapping[str, Tensor]] = [{}] * blocks
        if self._score.looks_at == "gradients":
            chosen = [list(zip(self._chosen(index), self._counts(index), strict=True)) for index in range(blocks)]
            weights = [self._weights(index) for index in range(blocks)]
            given = gradient_scores(self.dense, task.tokens, chosen, weights, self._score, task.progress)
        self._writer.write(0, self._outside)
        states = self.dense.embed(task.tokens, task.dtype)
        for index in range(blocks):
            task.progress("remove units", index, blocks, task.layout.block_name(index))
            self._writer.write(index + 1, partial(self._block, index, states, given[index]))
            if index == 0:
                self.cut.embed(task.tokens[:1], task.dtype)  # how it calls its blocks; it needs the first for that
            with self.cut.block(index, task.dtype) as block:
                self.cut.advance(block, index, states)
        task.progress("remove units", blocks, blocks, "")
        self._writer.finish(task.source.files())
        pairs = zip(self._chosen(0), self._counts(0), strict=True)
        return {"kept": {coupling.kind: [count, coupling.units] for coupling, count in pairs}}

    def _outside(self) -> dict[str, Tensor]:
        names = [name for spec in self._narrow.of_block(None) for name in spec.tensor_names()]
        return {name: self.task.source.load(name) for name in names}

    def _chosen(self, index: int, kind: str | None = None) -> list[Coupling]:
        kinds = kinds_of(self._options) if kind is None else (kind,)
        return [coupling for wanted in kinds for coupling in self._couplings[index].of(wanted)]

    def _counts(self, index: int, kind: str | None = None) -> list[int]:
        """How many units of each coupling stay, which the new widths say."""
        prefix = f"{self._narrow.block_name(index)}."
        return [
            self._narrow.by_name[prefix + coupling.consumer].shape[1] // coupling.columns.shape[1]
            for coupling in self._chosen(index, kind)
        ]

    def _weights(self, index: int) -> BlockWeights:
        layout = self.task.layout
        return BlockWeights(layout.of_block(index), f"{layout.block_name(index)}.", self.task.source.load)

    def _block(self, index: int, states: Tensor, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of one block after the cut."""
        refits = self._remake.refit(self._options)
        cut = BlockCut(self._weights(index), self._score, given, refits=refits, biased=self._remake.biased)
        with self.dense.block(index, self.task.dtype) as block:
            forwards = partial(self._forwards, block, index, states)
            for kind in kinds_of(self._options):
                cut.remove(block, forwards, self._chosen(index, kind), self._counts(index, kind))
        prefix = f"{self._narrow.block_name(index)}."
        wanted = shapes(self._narrow) if self._remake.biased else {}
        return cut.tensors({name: shape for name, shape in wanted.items() if name.startswith(prefix)})

    def _forwards(
        self, block: nn.Module, index: int, states: Tensor, parameters: Mapping[str, Tensor]
    ) -> Iterable[Callable[[], object]]:
        given = {name: tensor.to(states.dtype) for name, tensor in parameters.items()}
        return [partial(self.dense.run_with, block, index, batch, given) for batch in batches(states)]
