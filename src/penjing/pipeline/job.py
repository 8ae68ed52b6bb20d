"""One compression from start to end: plan, cut text, choose blocks, walk, finish the directory, verify, measure."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from safetensors.torch import load_file

from penjing.checkpoint import Checkpoint, open_checkpoint, write_bytes, write_shard
from penjing.costs import needs_text
from penjing.errors import PlanError, QualityError
from penjing.evaluation.card import model_card
from penjing.evaluation.html import html_page
from penjing.evaluation.metrics import Quality
from penjing.evaluation.report import Report, Skipped, Software, Source
from penjing.evaluation.size import Stages, weight_bytes
from penjing.evaluation.windows import Protocol
from penjing.memory import PeakMemory, configure_heap
from penjing.models import Layout, check_tied_head, layout_of
from penjing.numerics.precision import compute_dtype
from penjing.pipeline import decoding, encoders, measure
from penjing.pipeline.journal import FOLDER, Fingerprint, Journal, alone_in, require_usable
from penjing.pipeline.shares import require_room, with_shares
from penjing.pipeline.sizes import settle
from penjing.pipeline.stages import Outcome, clear_stages, complete, run_stages
from penjing.pipeline.stream import StreamedModel
from penjing.pipeline.text import Text, TextSource
from penjing.pipeline.verification import Verification, fits_in_memory, verify
from penjing.pipeline.weights import Weights
from penjing.pipeline.written_text import write_windows
from penjing.planning import Plan, make_plan
from penjing.progress import Progress
from penjing.recipe import Recipe
from penjing.runtime.memory import CacheMemory

_WRITTEN = "written.safetensors"
"""Calibration windows that the model wrote, in the output's working folder until the run ends."""

_ALLOCATED = "allocated.yaml"
"""Likewise the recipe in which every linear has its share."""


@dataclass(frozen=True)
class Job:
    """Everything that is known before the long work starts.

    calibration  windows the methods will see; None when no step looks at activations
    evaluation   windows the result is measured on; None when it will not be measured
    dtype        of the calibration arithmetic
    measured     the result will be measured (an encoder: on labelled texts, read when that begins)
    """

    recipe: Recipe
    checkpoint: Checkpoint
    layout: Layout
    plan: Plan
    directory: Path
    calibration: Text | None
    evaluation: Text | None
    dtype: torch.dtype
    trust_remote_code: bool
    measured: bool = True

    def fingerprint(self) -> Fingerprint:
        """Digests of all that the written bytes depend on."""
        data = "none" if self.calibration is None else self.calibration.protocol.token_hash
        versions = [f"{name} {metadata.version(name)}" for name in ("penjing", "torch", "transformers")]
        dtype = str(self.dtype).removeprefix("torch.")
        return Fingerprint(
            model=self.checkpoint.fingerprint()[:16],
            recipe=self.recipe.digest()[:16],
            data=data[:16],
            software=", ".join(versions),
            arithmetic=f"{dtype} on {torch.get_num_threads()} threads, {platform.machine()}",
        )


def prepare(
    model: str | Path, recipe: Recipe, directory: Path, *, measured: bool = True, trust_remote_code: bool = False
) -> Job:
    """Find every problem that can be found before a weight is read: recipe, model, format, text, output directory."""
    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code)
    layout = layout_of(checkpoint.config, checkpoint.specs(), trust_remote_code=trust_remote_code)
    check_tied_head(layout, checkpoint)
    decoding.require_cacheable(checkpoint.config, recipe.kv_cache, trust_remote_code=trust_remote_code)
    settled = settle(recipe, checkpoint.config, layout)
    recipe = settled.recipe
    plan = make_plan(checkpoint, layout, recipe)
    plan = replace(plan, warnings=(*settled.notes, *plan.warnings))
    require_room(checkpoint, layout, recipe)
    require_usable(directory)
    limits = recipe.require
    if not measured and (limits.max_kl or limits.max_perplexity_ratio):
        raise PlanError("the recipe limits what may be lost (`require`), so the result has to be measured: evaluate it")
    source = TextSource(checkpoint)
    wanted, windows = recipe.evaluation, not layout.encoder
    job = Job(
        recipe=recipe,
        checkpoint=checkpoint,
        layout=layout,
        plan=plan,
        directory=directory,
        calibration=source.calibration(recipe.calibration) if needs_text(recipe) and windows else None,
        evaluation=source.evaluation(wanted.data, wanted.windows, wanted.length) if measured and windows else None,
        dtype=compute_dtype(),
        trust_remote_code=trust_remote_code,
        measured=measured,
    )
    if layout.encoder:
        encoders.check(job)
    if job.calibration and job.evaluation and job.calibration.protocol.text_hash == job.evaluation.protocol.text_hash:
        raise PlanError(
            f"calibration and evaluation text are the same ({job.evaluation.protocol.corpus}); a model must be "
            "measured on text it was not calibrated on: set `evaluation: {data: ...}`"
        )
    return job


def run(job: Job, progress: Progress) -> Report:
    """Do the work that `prepare` laid out. Raises VerificationError or QualityError once the files are written."""
    with alone_in(job.directory):
        report = encoders.run(job, progress) if job.layout.encoder else _run(job, progress)
        _require(job.recipe, report)
        return report


def _run(job: Job, progress: Progress) -> Report:
    stages = Stages()
    if job.calibration is not None:
        progress("calibration text", 1, 1, " ".join(job.calibration.sample.split())[:60])
    configure_heap()
    journal = Journal.open(job.directory, job.fingerprint())
    journal.save()
    with PeakMemory() as memory, stages.stage("compress"):
        job = _with_shares(_with_written(job, progress), progress)
        outcome = run_stages(job, journal, progress)
    with stages.stage("complete the directory"):
        companion = outcome.checkpoint if outcome.made else job.checkpoint
        plan = replace(outcome.plan, recipe=job.recipe)
        weights = complete(job.directory, outcome.walk, outcome.checkpoint, plan, companion)
    with stages.stage("verify"):
        progress("verify", 0, 1, "")
        engine = fits_in_memory(outcome.plan.layout.parameters)
        verification = verify(job.directory, engine=engine, trust_remote_code=job.trust_remote_code)
        progress("verify", 1, 1, verification.how)
    with stages.stage("evaluate"):
        quality, held = _evaluate(job, progress)
    report = _report(job, outcome, weights, verification, quality, held, memory, stages)
    write_bytes(job.directory / "report.json", report.to_json().encode())
    write_bytes(job.directory / "report.html", html_page(report).encode())
    write_bytes(job.directory / "README.md", model_card(report).encode())
    clear_stages(job.directory)
    for name in (_WRITTEN, _ALLOCATED):
        (job.directory / FOLDER / name).unlink(missing_ok=True)
    journal.close()
    for shard in set(outcome.walk.shards) - set(weights):
        (job.directory / shard).unlink()
    return report


def _with_written(job: Job, progress: Progress) -> Job:
    """The job with the calibration windows that the model writes itself; an interrupted run has left them in a file."""
    wanted = job.recipe.calibration
    if job.calibration is None or not wanted.own_windows:
        return job
    source, path = TextSource(job.checkpoint), job.directory / FOLDER / _WRITTEN
    if not path.is_file():
        written = write_windows(source, wanted, job.dtype, progress, trust_remote_code=job.trust_remote_code)
        write_shard(path, {"tokens": written})
    return replace(job, calibration=source.joined(job.calibration, load_file(path)["tokens"]))


def _with_shares(job: Job, progress: Progress) -> Job:
    """The job with the recipe that its `allocate` comes to."""
    if job.recipe.allocate is None or job.calibration is None:
        return job
    recipe = with_shares(
        job.directory / FOLDER / _ALLOCATED,
        job.checkpoint,
        job.layout,
        job.recipe,
        job.plan.bytes,
        job.calibration.tokens,
        progress,
        trust_remote_code=job.trust_remote_code,
    )
    return replace(job, recipe=recipe, plan=make_plan(job.checkpoint, job.layout, recipe))


def _evaluate(job: Job, progress: Progress) -> tuple[Quality | None, CacheMemory | None]:
    """The written model, through the recipe's cache, against the dense one with a full cache; both streamed."""
    if job.evaluation is None:
        return None, None
    tokens = job.evaluation.tokens
    reference: measure.Candidate | None = None
    quality, held = None, None
    written = open_checkpoint(job.directory, trust_remote_code=job.trust_remote_code)
    for label, checkpoint in (("dense", job.checkpoint), ("compressed", written)):
        layout = layout_of(checkpoint.config, trust_remote_code=job.trust_remote_code)
        stream = StreamedModel(
            checkpoint.config, layout, Weights(checkpoint, layout).live, trust_remote_code=job.trust_remote_code
        )
        advanced = partial(measure.report_block, progress, f"evaluate {label}", layout.blocks)
        through = None if reference is None else job.recipe.kv_cache
        candidate, held = decoding.run(stream, tokens, through, job.plan.dtype, advanced)
        if reference is not None:
            quality = measure.compare(candidate, tokens, reference).result()
        reference = candidate
    return quality, held


def _report(
    job: Job,
    outcome: Outcome,
    weights: list[str],
    verification: Verification,
    quality: Quality | None,
    held: CacheMemory | None,
    memory: PeakMemory,
    stages: Stages,
) -> Report:
    plan, walk = outcome.plan, outcome.walk
    skipped = [Skipped(job.layout.block_name(index), f"removed by {reason}") for index, reason in outcome.removed]
    skipped += [Skipped(row.module.name, row.note) for row in plan.rows if row.note]
    source = Source(
        label=job.checkpoint.label,
        fingerprint=job.checkpoint.fingerprint(),
        model_type=job.layout.model_type,
        parameters=job.layout.parameters,
        bytes=job.plan.source_bytes,
        dtype=str(plan.dtype).removeprefix("torch."),
    )
    return Report(
        recipe=job.recipe.as_dict(),
        format=plan.format.name,
        source=source,
        modules=tuple(walk.rows),
        predicted_bytes=plan.bytes,
        bytes=sum(weight_bytes(job.directory / name) for name in weights),
        software=Software.here(),
        calibration=None if job.calibration is None else _in_dtype(job.calibration, job.dtype),
        sample="" if job.calibration is None else job.calibration.sample,
        quality=quality,
        protocol=None if job.evaluation is None else decoding.describe(job.evaluation.protocol, job.recipe.kv_cache),
        kv_cache=held,
        block_errors=tuple(walk.block_errors),
        skipped=tuple(skipped),
        made=tuple(dict(entry) for entry in outcome.made),
        peak_memory=memory.bytes,
        seconds=stages.seconds,
        verification=verification.as_dict(),
    )


def _in_dtype(text: Text, dtype: torch.dtype) -> Protocol:
    return replace(text.protocol, dtype=str(dtype).removeprefix("torch."))


def _require(recipe: Recipe, report: Report) -> None:
    """The recipe's limits on what may be lost. Raises QualityError; the files stay, with their report."""
    limits, quality = recipe.require, report.quality
    if limits.max_bytes is not None and report.bytes > limits.max_bytes:
        raise QualityError(f"the result has {report.bytes:,} bytes, the recipe allows {limits.max_bytes:,}")
    if quality is None:
        return
    if limits.max_kl is not None and quality.kl is not None and quality.kl > limits.max_kl:
        raise QualityError(
            f"KL to the dense model is {quality.kl:.4f} nats per token, the recipe allows {limits.max_kl}"
        )
    if limits.max_perplexity_ratio is not None and quality.reference_nll is not None:
        ratio = math.exp(min(quality.nll - quality.reference_nll, 700))
        if ratio > limits.max_perplexity_ratio:
            raise QualityError(
                f"perplexity is {ratio:.3f} times the dense model's, the recipe allows {limits.max_perplexity_ratio}"
            )
