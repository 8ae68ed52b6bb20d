"""The only code that walks a model to change it: block by block, load, observe, compress, write, propagate, free.

A finished block is a file. What comes after it is always run on what that file holds, whether the file was written a
moment ago or by an earlier, interrupted run: that is why a resumed run ends with the same bytes.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from pydantic import TypeAdapter
from safetensors import safe_open
from torch import Tensor, nn

from penjing.checkpoint import write_shard
from penjing.checkpoint.base import Checkpoint
from penjing.costs import bytes_of_gradients, joins_outputs, needs_original, weighs, weighs_tokens
from penjing.errors import CalibrationError, OutputError
from penjing.evaluation.report import ModuleRow
from penjing.methods.base import Call
from penjing.models.layout import InputGroup, Layout, ModuleSpec, Residual
from penjing.numerics.finite import all_finite
from penjing.pipeline.block import BlockCompressor, Lesson, ModuleResult
from penjing.pipeline.cache import BlockCache
from penjing.pipeline.curvature import Curvature, curvature
from penjing.pipeline.journal import FOLDER, Journal
from penjing.pipeline.stream import StreamedModel, batches
from penjing.pipeline.text import positions
from penjing.pipeline.weights import LiveModule, Weights, borrowing_module, decode_module, modules_outside_blocks
from penjing.planning import Plan, PlanRow
from penjing.progress import Progress
from penjing.rules import describe
from penjing.statistics import BlockStatisticType

PROBE_TOKENS = 64

_ROWS = TypeAdapter(list[ModuleRow])


@dataclass(frozen=True)
class WalkResult:
    """What a walk leaves behind besides files.

    shards        file name -> tensors in it
    rows          one line of the report per module
    block_errors  ||f'(x) - f(x)|| / ||f(x)|| of each block on the probe's hidden states
    probe_tokens  token ids (1, T)
    probe_logits  the logits (T, V) fp32 that the compressed model gives for them
    original      hidden states (S, T, D) after the last block of the model as it was, where something looked at them
    """

    shards: dict[str, list[str]]
    rows: list[ModuleRow]
    block_errors: list[float]
    probe_tokens: Tensor
    probe_logits: Tensor
    original: Tensor | None


class Walk:
    """One pass over a model.

    tokens  calibration windows (S, T), or None when no step looks at activations
    dtype   of the calibration arithmetic; the probe always runs in fp32
    """

    def __init__(
        self,
        plan: Plan,
        checkpoint: Checkpoint,
        directory: Path,
        journal: Journal,
        *,
        dtype: torch.dtype,
        tokens: Tensor | None,
        progress: Progress,
        trust_remote_code: bool = False,
    ) -> None:
        self.plan, self.layout = plan, plan.layout
        self.checkpoint = checkpoint
        self.directory, self.journal = directory, journal
        self.dtype, self.tokens = dtype, tokens
        self.progress = progress
        self._trust_remote_code = trust_remote_code
        self._rows = {row.module.name: row for row in plan.rows}
        self._cache = BlockCache(checkpoint)
        self._stream = StreamedModel(checkpoint.config, plan.layout, self._source, trust_remote_code=trust_remote_code)
        self._written: dict[str, Path] = {}
        self._curvature = Curvature()
        self._original: Tensor | None = None  # hidden states of the dense model, when something looks at them
        self._total = plan.layout.blocks + 2

    def run(self) -> WalkResult:
        """Walk the model; every finished shard is on disk and in the journal before the next begins."""
        self.journal.save()
        _require_space(self.directory, self.plan.bytes)
        before, after = modules_outside_blocks(self.layout)
        self._shard(1, before, self._outside)
        probe_tokens = self._probe_tokens()
        probe = self._stream.embed(probe_tokens, torch.float32)
        states = self._calibration_states()
        if states is not None and needs_original(self.plan.recipe):
            self._original = states.clone()
        if self.tokens is not None and not self._blocks_done():
            self._curvature = self._look_at_gradients(self.tokens)
        block_errors = []
        for index in range(self.layout.blocks):
            self.progress("compress", index, self.layout.blocks, self.layout.block_name(index))
            block_errors.append(self._block(index, states, probe))
        self.progress("compress", self.layout.blocks, self.layout.blocks, "")
        self._shard(self._total, after, partial(self._outside, states=states))
        shutil.rmtree(self._gradients, ignore_errors=True)
        with self._stream.head(torch.float32) as logits:
            probe_logits = logits(probe)
        notes = {path.name: self.journal.shards[path.name]["notes"] for path in self._written.values()}
        return WalkResult(
            shards={shard: note["tensors"] for shard, note in notes.items()},
            rows=[row for note in notes.values() for row in _ROWS.validate_python(note["rows"])],
            block_errors=block_errors,
            probe_tokens=probe_tokens,
            probe_logits=probe_logits,
            original=self._original,
        )

    def _blocks_done(self) -> bool:
        """Whether an earlier run has written all of them."""
        names = (self._path(index + 2).name for index in range(self.layout.blocks))
        return all(self.journal.finished(name) is not None for name in names)

    def _look_at_gradients(self, tokens: Tensor) -> Curvature:
        """What the recipe's steps want of them; from the dense model in any case."""
        recipe, rows = self.plan.recipe, self.plan.rows
        weighed = weighs_tokens(recipe)
        steps = {
            row.module.name: [recipe.steps[step] for step in row.steps] for row in rows if row.module.block is not None
        }
        together = [name for name, own in steps.items() if any(map(joins_outputs, own))]
        alone = [name for name, own in steps.items() if weighed and any(map(weighs, own))]
        linears = self.layout.inside_blocks(dict.fromkeys([*alone, *together]))
        if not linears:
            return Curvature()
        shutil.rmtree(self._gradients, ignore_errors=True)
        grams = bytes_of_gradients(self.layout.by_name[name] for name in together)
        _require_space(self.directory, self.plan.bytes + grams)
        trust = self._trust_remote_code
        dense = StreamedModel(
            self.checkpoint.config, self.layout, Weights(self.checkpoint, self.layout).live, trust_remote_code=trust
        )
        found = curvature(dense, tokens, linears, self.dtype, self.progress, folder=self._gradients, together=together)
        return found if weighed else replace(found, token_weights=None)

    @property
    def _gradients(self) -> Path:
        """Where Gram matrices of gradients lie until the blocks are done."""
        return self.directory / FOLDER / "gradients"

    def _calibration_states(self) -> Tensor | None:
        """Hidden states of the calibration windows: in memory, or in a file that lives as long as its mapping."""
        if self.tokens is None:
            return None
        if not self.plan.recipe.calibration.spill:
            return self._stream.embed(self.tokens, self.dtype)
        file = self.directory / FOLDER / "hidden-states.tmp"

        def allocate(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            _require_space(self.directory, math.prod(shape) * dtype.itemsize + self.plan.bytes)
            mapped = torch.from_file(str(file), shared=True, size=math.prod(shape), dtype=dtype).view(shape)
            file.unlink()
            return mapped

        return self._stream.embed(self.tokens, self.dtype, allocate)

    def _probe_tokens(self) -> Tensor:
        if self.tokens is not None:
            return self.tokens[:1, :PROBE_TOKENS]
        vocabulary = self.layout.embedding.shape[0]
        length = min(PROBE_TOKENS, positions(self.checkpoint.config) or PROBE_TOKENS)
        return torch.randint(vocabulary, (1, length), generator=torch.Generator().manual_seed(0))

    def _block(self, index: int, states: Tensor | None, probe: Tensor) -> float:
        """Compress one block unless its shard exists, then advance all hidden states through what the shard holds."""
        with self._stream.block(index, torch.float32) as block:
            expected = self._stream.run(block, index, probe)
        if not all_finite(expected):
            raise CalibrationError(
                f"{self.layout.block_name(index)} of the dense model gives NaN or infinite values in fp32: "
                "its weights are damaged, or too large to compute with"
            )
        if self._original is not None and self.journal.finished(self._path(index + 2).name) is not None:
            with self._stream.block(index, self.dtype) as block:
                self._stream.advance(block, index, self._original)
        self._shard(index + 2, self.layout.of_block(index), partial(self._compress_block, index, states))
        if states is not None and self._are_read_after(index):
            if self.plan.recipe.propagate == "original" and self._original is not None:
                states.copy_(self._original)
            else:
                with self._stream.block(index, self.dtype) as block:
                    self._stream.advance(block, index, states)
        with self._stream.block(index, torch.float32) as block:
            self._stream.advance(block, index, probe)
        return float((probe - expected).norm() / expected.norm())

    def _are_read_after(self, index: int) -> bool:
        """Whether anything looks at the calibration states that leave block `index`: the next block, or the head."""
        _, after = modules_outside_blocks(self.layout)
        head = self._compressor(after, "", ())
        return index + 1 < self.layout.blocks or bool(head.needs() or head.measured())

    def _compress_block(self, index: int, states: Tensor | None, modules: Sequence[ModuleSpec]) -> list[ModuleResult]:
        residual = self.layout.residual[index] if self.layout.residual else None
        compressor = self._compressor(modules, f"{self.layout.block_name(index)}.", self.layout.groups[index], residual)
        if states is None or not (
            compressor.needs() or compressor.learns() or compressor.measured() or self._original is not None
        ):
            return compressor.finish(nn.Module(), {})
        with self._stream.block(index, self.dtype) as block:
            forwards = [partial(self._stream.run, block, index, batch) for batch in batches(states)]
            dense = None
            if self._original is not None and compressor.compares():
                dense = [partial(self._stream.advance, block, index, batch) for batch in batches(self._original)]
            weights, grams = self._curvature.token_weights, self._curvature.output_grams(index)
            calls = compressor.observe(block, forwards if compressor.needs() else [], dense, weights, grams)
            lesson = None
            if self._original is not None:
                if dense is None:
                    self._stream.advance(block, index, self._original)
                lesson = Lesson(states, self._original, partial(self._stream.run_with, block, index))
            return compressor.finish(block, calls, lesson, partial(self._replay, block, index, states))

    def _replay(
        self, block: nn.Module, index: int, states: Tensor, parameters: Mapping[str, Tensor]
    ) -> list[Callable[[], object]]:
        """The forward passes of a block over all batches, with other values for some of its parameters."""
        given = {name: tensor.to(states.dtype) for name, tensor in parameters.items()}
        return [partial(self._stream.run_with, block, index, batch, given) for batch in batches(states)]

    def _outside(self, modules: Sequence[ModuleSpec], states: Tensor | None = None) -> list[ModuleResult]:
        """Embeddings, final norm and head."""
        compressor = self._compressor(modules, "", ())
        calls: dict[str, list[Call]] = {}
        if states is not None and (compressor.needs() or compressor.measured()):
            with self._stream.head(self.dtype) as logits:
                forwards = [partial(logits, window.unsqueeze(0)) for window in states]
                dense = None
                if self._original is not None and compressor.compares():
                    dense = [partial(logits, window.unsqueeze(0)) for window in self._original]
                calls = compressor.observe(self._stream.model, forwards if compressor.needs() else [], dense)
                compressor.measure(self._stream.model, forwards)
        return compressor.finish(self._stream.model, calls)

    def _compressor(
        self,
        modules: Sequence[ModuleSpec],
        prefix: str,
        groups: Sequence[InputGroup],
        residual: Residual | None = None,
    ) -> BlockCompressor:
        rows = [self._rows[module.name] for module in modules]
        return BlockCompressor(self.plan, self._cache.load, rows, prefix, groups, residual)

    def _path(self, number: int) -> Path:
        return self.directory / f"model-{number:05d}-of-{self._total:05d}.safetensors"

    def _shard(
        self, number: int, modules: Sequence[ModuleSpec], make: Callable[[Sequence[ModuleSpec]], list[ModuleResult]]
    ) -> None:
        """Make and write shard `number` unless an earlier run did; from here on the modules are read from it."""
        modules = [module for module in modules if module.tensors]
        path = self._path(number)
        if modules and self.journal.finished(path.name) is None:
            results = make(modules)
            tensors = {name: tensor for result in results for name, tensor in result.packed.items()}
            rows = [self._row(result) for result in results]
            write_shard(path, tensors)
            self.journal.add(path.name, {"tensors": sorted(tensors), "rows": _ROWS.dump_python(rows, mode="json")})
        self._written |= dict.fromkeys((module.name for module in modules), path)
        self._cache.clear()

    def _row(self, result: ModuleResult) -> ModuleRow:
        """One line of the report."""
        row = self._rows[result.module.name]
        return ModuleRow(
            name=result.module.name,
            kind=result.module.kind,
            block=result.module.block,
            shape=tuple(result.module.tensors.get("weight", ())),
            steps=tuple(self.plan.recipe.steps[step].method for step in row.steps),
            scheme=describe(row.scheme),
            bits=row.scheme.grid.bits if row.scheme.grid else None,
            predicted_bytes=row.bytes,
            bytes=sum(tensor.numel() * tensor.element_size() for tensor in result.packed.values()),
            error=result.error,
            error_kind=result.error_kind,
            tokens=result.tokens,
            notes=(
                *result.notes,
                *([f"left {'dense' if row.scheme.dense else 'out'}: {row.note}"] if row.note else []),
                *filter(None, [row.remark]),
                *([f"computes with the weight of {result.module.owner}"] if result.module.owner else []),
            ),
        )

    def _source(self, module: ModuleSpec, dtype: torch.dtype) -> LiveModule:
        """A module as written if its shard is done, as in the dense model before."""
        path = self._written.get(module.name)
        if module.owner:
            owner = self._source(self.layout.by_name[module.owner], dtype)
            if path is None:
                return borrowing_module(module, owner, self._cache.load, dtype)
            with safe_open(path, "pt") as shard:
                return borrowing_module(module, owner, shard.get_tensor, dtype)
        if path is None:
            return decode_module(module, None, self.plan.format, self._cache.load, dtype)
        return self._from_shard(path, self._rows[module.name], dtype)

    def _from_shard(self, path: Path, row: PlanRow, dtype: torch.dtype) -> LiveModule:
        with safe_open(path, "pt") as shard:
            return decode_module(row.module, row.scheme, self.plan.format, shard.get_tensor, dtype)


def _require_space(directory: Path, needed: int) -> None:
    """Refuse at once what would fill the disk hours later."""
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise OutputError(f"{directory} has {free / 1e6:.0f} MB free and the run needs {needed / 1e6:.0f} MB")


def score_blocks(
    checkpoint: Checkpoint,
    layout: Layout,
    tokens: Tensor,
    kind: BlockStatisticType,
    *,
    dtype: torch.dtype,
    progress: Progress,
    trust_remote_code: bool = False,
) -> Tensor:
    """One forward pass over the dense model: a score per block, fp64 (blocks,)."""
    source = Weights(checkpoint, layout).live
    stream = StreamedModel(checkpoint.config, layout, source, trust_remote_code=trust_remote_code)
    states = stream.embed(tokens, dtype)
    scores = []
    for index in range(layout.blocks):
        progress("score blocks", index, layout.blocks, layout.block_name(index))
        statistic = kind()
        with stream.block(index, dtype) as block:
            for batch in batches(states):
                output = stream.run(block, index, batch)
                statistic.update(batch.flatten(0, 1), output.flatten(0, 1))
                batch.copy_(output)
        scores.append(statistic.value)
    progress("score blocks", layout.blocks, layout.blocks, "")
    return torch.tensor(scores, dtype=torch.float64)
