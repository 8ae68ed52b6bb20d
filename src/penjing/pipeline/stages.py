"""The walks of a recipe one after another, and the models that are made between them.

A recipe without a step that makes another model is one walk. With such steps, each walk but the last writes a dense
checkpoint, a maker turns it into another one, and the next walk starts from that; all of them lie in the output's
working folder until the run ends. What is finished there is not done again when an interrupted run resumes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from torch import Tensor

from penjing.checkpoint import Checkpoint, open_checkpoint, write_bytes, write_index
from penjing.checkpoint.directory import INDEX
from penjing.formats.base import Finished, OneFile, WithGraph
from penjing.methods.base import Remake
from penjing.methods.pruning.channels import StreamCut
from penjing.methods.pruning.cut import UnitCut
from penjing.methods.pruning.layer_cut import LayerCut
from penjing.methods.pruning.loraprune import TrainedCut
from penjing.methods.pruning.taylor import WeightPruning
from penjing.methods.pruning.vocabulary import VocabularyCut
from penjing.methods.quantization.kivi import CONFIG_KEY
from penjing.methods.training import Trained
from penjing.methods.weight_sharing.tie import Tie
from penjing.models import Layout, layout_of
from penjing.pipeline.channel_cut import cut_channels
from penjing.pipeline.cutting import cut_units
from penjing.pipeline.journal import FOLDER, Journal
from penjing.pipeline.layer_cut import cut_layers
from penjing.pipeline.rewritten import RewrittenCheckpoint
from penjing.pipeline.stream import StreamedModel
from penjing.pipeline.subset import BlockSubset
from penjing.pipeline.trained import make_trained, make_trained_cut
from penjing.pipeline.tune import FinishedModel, tune
from penjing.pipeline.tying import tie_blocks
from penjing.pipeline.verification import save_probe
from penjing.pipeline.vocabulary_cut import trim_vocabulary
from penjing.pipeline.walk import PROBE_TOKENS, Walk, WalkResult, score_blocks
from penjing.pipeline.weight_pruning import prune_weights
from penjing.pipeline.weights import ShardReader, Weights
from penjing.planning import Plan, plan_walk
from penjing.progress import Progress
from penjing.recipe import Recipe, Step
from penjing.representations import Scheme

if TYPE_CHECKING:
    from penjing.pipeline.job import Job


@dataclass(frozen=True)
class RemakeTask:
    """What making another model starts from.

    step       the recipe's step, with its options
    source     the dense model that is made over, and where everything is in it
    config     config.json of the model to make
    original   the model that the recipe started from: the teacher
    tokens     calibration windows (S, T)
    zeros      modules of which an earlier step pruned weights that must stay zero
    directory  where the new checkpoint goes; an earlier attempt may have left its own files there
    """

    step: Step
    source: Checkpoint
    layout: Layout
    config: Mapping[str, Any]
    original: Checkpoint
    recipe: Recipe
    tokens: Tensor
    zeros: Mapping[str, Scheme]
    directory: Path
    dtype: torch.dtype
    progress: Progress
    trust_remote_code: bool = False


Maker = Callable[[RemakeTask], Mapping[str, Any]]
"""Writes a dense Hugging Face directory and returns what the report should say of it, as JSON."""

MAKERS: dict[type[Remake], Maker] = {
    Trained: make_trained,
    TrainedCut: make_trained_cut,
    UnitCut: cut_units,
    StreamCut: cut_channels,
    LayerCut: cut_layers,
    WeightPruning: prune_weights,
    Tie: tie_blocks,
    VocabularyCut: trim_vocabulary,
}
"""Who does the work of each kind of `Remake`."""


@dataclass
class Outcome:
    """What all walks of a job leave behind besides files.

    walk        of the last, which wrote the output
    checkpoint  the model it walked, and its plan
    removed     blocks of the original that are gone, each with the reason
    made        one entry per model that was made on the way
    """

    walk: WalkResult
    checkpoint: Checkpoint
    plan: Plan
    removed: list[tuple[int, str]]
    made: list[Mapping[str, Any]] = field(default_factory=list)


def run_stages(job: Job, journal: Journal, progress: Progress) -> Outcome:
    """Walk, make, walk again, until the output's shards are written."""
    checkpoint = job.checkpoint
    removed: list[tuple[int, str]] = []
    made: list[Mapping[str, Any]] = []
    plans = job.plan.walks
    for number, (plan, after, stage) in enumerate(zip(plans, plans[1:], job.recipe.stages(), strict=False), 1):
        folder = job.directory / FOLDER / f"stage-{number}"
        if plan.recipe.steps:
            removed += _walk_into(folder / "walked", job, plan, checkpoint, journal, progress)
            checkpoint = open_checkpoint(folder / "walked", trust_remote_code=job.trust_remote_code)
        assert stage.remake is not None and job.calibration is not None
        made.append(make(folder / "made", job, stage.remake, checkpoint, after, progress))
        checkpoint = open_checkpoint(folder / "made", trust_remote_code=job.trust_remote_code)
    last = _with_owners_of(checkpoint, plans[-1], job.trust_remote_code) if made else plans[-1]
    one = _Walker(job, job.directory, last, checkpoint, journal, progress)
    walk = one.run()
    return Outcome(walk, one.checkpoint, one.plan, removed + one.removed, made)


def _with_owners_of(checkpoint: Checkpoint, plan: Plan, trust_remote_code: bool) -> Plan:
    """`plan` for the model that was made, where measurement decided which of its linears share weights."""
    if not plan.layout.owners:
        return plan
    layout = layout_of(checkpoint.config, checkpoint.specs(), trust_remote_code=trust_remote_code)
    before = plan.before.rows if plan.before else ()
    given = {row.module.name: row.scheme for row in before if row.scheme.sparsity}
    return replace(plan_walk(plan.label, checkpoint.config, layout, plan.told, given), before=plan.before)


def clear_stages(directory: Path) -> None:
    """Remove the models made on the way; the run is complete."""
    for folder in (directory / FOLDER).glob("stage-*"):
        shutil.rmtree(folder)


def _walk_into(
    directory: Path, job: Job, plan: Plan, checkpoint: Checkpoint, journal: Journal, progress: Progress
) -> list[tuple[int, str]]:
    """A walk that is not the last: a dense checkpoint in `directory`. Returns the blocks it removed."""
    done = directory.with_suffix(".json")
    if not done.is_file():
        own = Journal.open(directory, journal.fingerprint)
        walker = _Walker(job, directory, plan, checkpoint, own, progress)
        complete(directory, walker.run(), walker.checkpoint, walker.plan)
        write_bytes(done, json.dumps({"removed": walker.removed}).encode())
        own.close()
    return [(index, reason) for index, reason in json.loads(done.read_text(encoding="utf-8"))["removed"]]


def make(
    directory: Path, job: Job, step: Step, checkpoint: Checkpoint, after: Plan, progress: Progress
) -> Mapping[str, Any]:
    """The model that a step makes, in `directory`."""
    done = directory.with_suffix(".json")
    if not done.is_file():
        directory.mkdir(parents=True, exist_ok=True)
        remake = step.definition.remake
        assert remake is not None
        layout = layout_of(checkpoint.config, checkpoint.specs(), trust_remote_code=job.trust_remote_code)
        task = RemakeTask(
            step=step,
            source=checkpoint,
            layout=layout,
            config=remake.config(checkpoint.config, layout, step.options),
            original=job.checkpoint,
            recipe=job.recipe,
            tokens=torch.empty(0, 0, dtype=torch.long) if job.calibration is None else job.calibration.tokens,
            zeros={row.module.name: row.given for row in after.rows if row.given.sparsity},
            directory=directory,
            dtype=job.dtype,
            progress=progress,
            trust_remote_code=job.trust_remote_code,
        )
        said = MAKERS[type(remake)](task)
        write_bytes(done, json.dumps({"step": step.as_dict(), **said}).encode())
    result: Mapping[str, Any] = json.loads(done.read_text(encoding="utf-8"))
    return result


class _Walker:
    """One walk with what surrounds it: blocks are chosen and the model rewritten before, its scales trained after."""

    def __init__(
        self, job: Job, directory: Path, plan: Plan, checkpoint: Checkpoint, journal: Journal, progress: Progress
    ) -> None:
        self.plan, self.checkpoint = plan, checkpoint
        self.removed: list[tuple[int, str]] = []
        self._job, self._directory, self._journal, self._progress = job, directory, journal, progress
        self._tokens = None if job.calibration is None else job.calibration.tokens

    def run(self) -> WalkResult:
        """Write the shards of the directory."""
        self._choose_blocks()
        walk = self._walk(self._tokens)
        if self._tokens is not None and any(step.definition.tune for step in self.plan.recipe.steps):
            self._train(self._tokens, walk.original if self.checkpoint is self._job.checkpoint else None)
            walk = self._walk(self._tokens[:1, :PROBE_TOKENS])
        return walk

    def _choose_blocks(self) -> None:
        """The model that is walked: the checkpoint itself, or the blocks that selecting steps keep, rewritten.

        Blocks are chosen by what the model does before the walk.
        """
        trust = self._job.trust_remote_code
        layout = layout_of(self.checkpoint.config, self.checkpoint.specs(), trust_remote_code=trust)
        names = list(range(layout.blocks))
        steps = list(self.plan.recipe.steps)
        while self._tokens is not None and steps and (selection := steps[0].definition.select):
            step = steps.pop(0)
            scores = score_blocks(
                self.checkpoint,
                layout,
                self._tokens,
                selection.scores,
                dtype=self._job.dtype,
                progress=self._progress,
                trust_remote_code=trust,
            )
            gone = set(selection.choose(scores, step.options))
            self.removed += [(names[index], f"{step.method}: score {scores[index]:.4f}") for index in sorted(gone)]
            keep = [index for index in range(len(names)) if index not in gone]
            names = [names[index] for index in keep]
            self.checkpoint = BlockSubset(self.checkpoint, layout, keep)
            layout = layout_of(self.checkpoint.config, self.checkpoint.specs(), trust_remote_code=trust)
        if self.removed:
            told = [step for step in self.plan.told.steps if step.definition.select is None]
            rest = self.plan.told.model_copy(update={"steps": tuple(told)})
            self.plan = plan_walk(self.checkpoint.label, self.checkpoint.config, layout, rest, {})
        if self.plan.rewriting is not None:
            self.checkpoint = RewrittenCheckpoint(self.checkpoint, self.plan.rewriting, str(steps[0].as_dict()))

    def _walk(self, tokens: Tensor | None) -> WalkResult:
        return Walk(
            self.plan,
            self.checkpoint,
            self._directory,
            self._journal,
            dtype=self._job.dtype,
            tokens=tokens,
            progress=self._progress,
            trust_remote_code=self._job.trust_remote_code,
        ).run()

    def _train(self, tokens: Tensor, targets: Tensor | None) -> None:
        """The steps that bring the finished model's logits back to those of the dense model, blocks removed or not.

        targets  hidden states of the dense model after its last block, if the walk has left them
        """
        job = self._job
        source = Weights(job.checkpoint, job.layout).live
        teacher = StreamedModel(job.checkpoint.config, job.layout, source, trust_remote_code=job.trust_remote_code)
        model = FinishedModel(
            self.plan,
            self.checkpoint.config,
            teacher,
            self._directory,
            self._journal,
            tokens,
            teacher.forward(tokens, job.dtype) if targets is None else targets,
            trust_remote_code=job.trust_remote_code,
        )
        tune(model, self._journal, self._progress)


_NOT_WRITTEN = ("quantization_config", "torch_dtype", "_name_or_path", CONFIG_KEY)
"""Keys of a source's config.json that do not hold for the result."""


def complete(
    directory: Path, walk: WalkResult, checkpoint: Checkpoint, plan: Plan, companion: Checkpoint | None = None
) -> list[str]:
    """Everything a model directory needs beside its shards, or the one file made of them; names of the weight files.

    companion  the model whose tokenizer goes into one file, where that is not what was walked
    """
    schemes = {row.module: row.scheme for row in plan.rows if "weight" in row.module.tensors or row.module.owner}
    config = {key: value for key, value in checkpoint.config.items() if key not in _NOT_WRITTEN}
    config |= {"dtype": str(plan.dtype).removeprefix("torch.")} | plan.format.config(schemes, plan.dtype)
    if plan.recipe.kv_cache is not None:
        config[CONFIG_KEY] = plan.recipe.kv_cache.model_dump()
    write_bytes(directory / "recipe.yaml", yaml.safe_dump(plan.recipe.as_dict(), sort_keys=False).encode())
    if isinstance(plan.format, OneFile):
        named = {module.name: scheme for module, scheme in schemes.items()}
        load = ShardReader(directory, walk.shards)
        source = companion or checkpoint
        finished = Finished(directory, plan.layout, named, config, plan.dtype, source, load)
        weights = written = [plan.format.assemble(finished).name]
    else:
        write_index(directory, walk.shards, sum(row.bytes for row in walk.rows))
        write_bytes(directory / "config.json", (json.dumps(config, indent=2) + "\n").encode())
        for name, content in checkpoint.files():
            write_bytes(directory / name, content)
        weights, written = sorted(walk.shards), [*walk.shards, INDEX, "config.json"]
        if isinstance(plan.format, WithGraph):
            written += plan.format.write_beside(directory, plan.layout, config)
    save_probe(directory, walk.probe_tokens, walk.probe_logits, written)
    return weights
