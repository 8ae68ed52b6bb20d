"""What `import penjing` offers: plan, allocate, compress, evaluate and so on. The command line adds nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penjing.budgets import Model, silent
from penjing.budgets import allocate as allocate
from penjing.budgets import distribute as distribute
from penjing.budgets import ranks as ranks
from penjing.checkpoint import Checkpoint, open_checkpoint
from penjing.errors import PlanError
from penjing.evaluation.measured import ClassifierEvaluation, Evaluation
from penjing.formats import format_of
from penjing.models import Layout, layout_of
from penjing.models.families import is_encoder
from penjing.planning import Plan, describe, make_plan
from penjing.recipe import Recipe, load_recipe
from penjing.representations import Scheme

if TYPE_CHECKING:
    from penjing.engines.bench import Bench, Load
    from penjing.engines.serving import Serving
    from penjing.evaluation.report import Report
    from penjing.methods.quantization.kivi import KVCache
    from penjing.pipeline.engine_check import EngineCheck
    from penjing.pipeline.export import Exported
    from penjing.pipeline.measure import Candidate
    from penjing.pipeline.verification import Verification
    from penjing.progress import Progress

# What walks a model is imported by the functions that walk one: a plan should take no longer than it must.


@dataclass(frozen=True)
class Inspection:
    """What a model is made of, as far as its config and headers tell."""

    label: str
    format: str
    bytes: int
    config: dict[str, Any]
    layout: Layout

    def as_dict(self) -> dict[str, Any]:
        """For JSON: totals, the modules, and the facts a recipe relies on."""
        layout = self.layout
        return {
            "model": self.label,
            "model_type": layout.model_type,
            "family": layout.family,
            "format": self.format,
            "dtype": str(self.config.get("dtype") or self.config.get("torch_dtype") or "float32"),
            "bytes": self.bytes,
            "parameters": layout.parameters,
            "blocks": layout.blocks,
            "block_path": layout.block_path,
            "tied": layout.tied,
            "never": dict(layout.never or {}),
            "groups": [asdict(group) for group in (layout.groups[0] if layout.groups else ())],
            "modules": [
                {
                    "name": module.name,
                    "kind": module.kind,
                    "shape": list(module.shape) if "weight" in module.tensors else None,
                    "parameters": module.parameters,
                }
                for module in layout.modules
            ],
        }


def inspect(model: Model, *, trust_remote_code: bool = False) -> Inspection:
    """What is in a model; reads headers, no weights. Raises CheckpointError."""
    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code, weights=False)
    specs = checkpoint.specs()
    layout = layout_of(checkpoint.config, specs or None, trust_remote_code=trust_remote_code)
    size = sum(spec.nbytes for spec in specs.values())
    stored = "gguf" if checkpoint.path.suffix == ".gguf" else format_of(checkpoint.config).name
    return Inspection(checkpoint.label, stored, size, checkpoint.config, layout)


def plan(
    model: Model,
    recipe: str | Path | dict[str, Any] | Recipe,
    *,
    engine: str | None = None,
    trust_remote_code: bool = False,
) -> Plan:
    """What a recipe would do to a model. `model` may be a directory with nothing but a config.json.

    engine  where the result shall run: what is known of it adds warnings, or refuses

    Raises RecipeError, CheckpointError or PlanError, whichever names the first problem.
    """
    from penjing.pipeline import shares, sizes

    chosen = load_recipe(recipe)
    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code, weights=False)
    layout = layout_of(checkpoint.config, checkpoint.specs() or None, trust_remote_code=trust_remote_code)
    if chosen.kv_cache is not None:
        from penjing.pipeline import decoding

        decoding.require_cacheable(checkpoint.config, chosen.kv_cache, trust_remote_code=trust_remote_code)
    settled = sizes.settle(chosen, checkpoint.config, layout)
    made = make_plan(checkpoint, layout, settled.recipe)
    shares.require_room(checkpoint, layout, settled.recipe)
    made = replace(made, warnings=(*settled.notes, *made.warnings))
    if engine is None:
        return made
    from penjing.engines import truth

    schemes = [describe(row.scheme) for row in made.rows if not row.scheme.dense] or [describe(Scheme())]
    warnings = truth.judge(engine, layout.model_type, chosen.format, schemes)
    return replace(made, warnings=(*made.warnings, *warnings))


def compress(
    model: Model,
    recipe: str | Path | dict[str, Any] | Recipe,
    output: str | Path,
    *,
    progress: Progress = silent,
    evaluated: bool = True,
    trust_remote_code: bool = False,
) -> Report:
    """Apply a recipe, write the result to `output`, read it back, measure it against the dense model.

    Interrupted, the same call goes on where it stopped and ends with the same bytes. `evaluated=False` leaves the
    evaluation out (the result is still verified). Raises a PenjingError naming what is wrong.
    """
    from penjing.pipeline import job

    made = job.prepare(
        model, load_recipe(recipe), Path(output), measured=evaluated, trust_remote_code=trust_remote_code
    )
    return job.run(made, progress)


def verify(
    directory: str | Path,
    *,
    engine: str | None = None,
    against: Model | None = None,
    progress: Progress = silent,
    trust_remote_code: bool = False,
) -> Verification | EngineCheck:
    """Load what `compress` wrote as a user would and compare its logits with those it had in memory.

    engine   load any model in this engine instead, and compare with what Penjing computes from its weights
    against  the model whose weights are read, where Penjing cannot read those of `directory`

    Raises VerificationError naming what differs.
    """
    from penjing.pipeline import engine_check, verification

    if engine is not None:
        return engine_check.check(
            directory, engine, against=against, progress=progress, trust_remote_code=trust_remote_code
        )
    progress("verify", 0, 1, str(directory))
    result = verification.verify(Path(directory), engine=True, trust_remote_code=trust_remote_code)
    progress("verify", 1, 1, str(directory))
    return result


def evaluate(
    model: Model,
    *,
    against: Model | None = None,
    data: str = "builtin",
    windows: int | None = 8,
    length: int = 2048,
    kv_cache: KVCache | None = None,
    tasks: Sequence[str | Path] = (),
    limit: int | None = None,
    progress: Progress = silent,
    trust_remote_code: bool = False,
) -> Evaluation | ClassifierEvaluation:
    """Perplexity of a model and, `against` another, KL divergence and top-1 agreement on the same tokens.

    Of an encoder that classifies: accuracy, and agreement, on the labelled records of `data`.

    With `kv_cache` the model reads its past through such a cache, and is compared with itself when `against` is None.
    tasks  names of lm-eval or .jsonl files of questions, which the model answers too    limit  questions of each
    """
    if kv_cache is not None and against is None:
        against = model
    results = compare(
        [model] if against is None else [against, model],
        data=data,
        windows=windows,
        length=length,
        kv_cache=kv_cache,
        tasks=tasks,
        limit=limit,
        progress=progress,
        trust_remote_code=trust_remote_code,
    )
    return results[-1]


def compare(
    models: Sequence[Model],
    *,
    data: str = "builtin",
    windows: int | None = 8,
    length: int = 2048,
    kv_cache: KVCache | None = None,
    tasks: Sequence[str | Path] = (),
    limit: int | None = None,
    progress: Progress = silent,
    trust_remote_code: bool = False,
) -> Sequence[Evaluation | ClassifierEvaluation]:
    """Measure several models on the same text; the first is the reference the others are compared with.

    With `kv_cache`, all but the first read their past through such a cache; the first always has a full one.
    tasks  names of lm-eval or .jsonl files (see `penjing.evaluation.questions`)    limit  questions asked of each

    Raises PlanError when vocabularies differ: their logits cannot be compared; and what `penjing.pipeline.tasks` does.
    """
    from penjing.evaluation.size import weight_bytes
    from penjing.pipeline import decoding, measure
    from penjing.pipeline import tasks as questions
    from penjing.pipeline.stream import StreamedModel
    from penjing.pipeline.text import TextSource, positions
    from penjing.pipeline.weights import Weights

    asked = questions.load(tasks, limit, full_cache=kv_cache is None)
    checkpoints = [open_checkpoint(model, trust_remote_code=trust_remote_code) for model in models]
    if is_encoder(checkpoints[0].config):
        questions.refuse_for_encoders(asked, checkpoints[0].label)
        return _classified(checkpoints, data, length)
    layouts = [layout_of(each.config, each.specs(), trust_remote_code=trust_remote_code) for each in checkpoints]
    for checkpoint, layout in zip(checkpoints, layouts, strict=True):
        _require_same_vocabulary(checkpoint, layout, layouts[0])
        decoding.require_cacheable(checkpoint.config, kv_cache, trust_remote_code=trust_remote_code)
    source = TextSource(checkpoints[0])
    text = source.evaluation(data, windows, length)
    reference: Candidate | None = None
    results = []
    for checkpoint, layout in zip(checkpoints, layouts, strict=True):
        stream = StreamedModel(
            checkpoint.config, layout, Weights(checkpoint, layout).live, trust_remote_code=trust_remote_code
        )
        through = None if reference is None else kv_cache
        label = checkpoint.label if through is None else f"{checkpoint.label}, {through.bits}-bit KV cache"
        advanced = partial(measure.report_block, progress, f"evaluate {label}", layout.blocks)
        dtype = decoding.model_dtype(checkpoint.config)
        candidate, held = decoding.run(stream, text.tokens, through, dtype, advanced)
        quality = measure.compare(candidate, text.tokens, reference).result()
        against = None if reference is None else checkpoints[0].label
        size = weight_bytes(checkpoint.path)
        protocol = decoding.describe(text.protocol, through)
        answered = partial(progress, f"tasks {label}")
        scores = questions.run(asked, stream, source.tokenizer, positions(checkpoint.config), answered)
        results.append(Evaluation(label, against, size, layout.parameters, quality, protocol, held, scores))
        reference = reference or candidate
    return results


def _classified(checkpoints: Sequence[Checkpoint], data: str, length: int) -> list[ClassifierEvaluation]:
    """Classifiers on the same labelled texts, all against the first."""
    from penjing.evaluation.size import weight_bytes
    from penjing.pipeline import encoders

    results: list[ClassifierEvaluation] = []
    reference = None
    for checkpoint in checkpoints:
        found = encoders.answers(checkpoint, data, length)
        if found is None:
            raise PlanError(f"{checkpoint.label} has no head for classes; make one with a `classify` step")
        parameters = layout_of(checkpoint.config, checkpoint.specs()).parameters
        against = None if reference is None else checkpoints[0].label
        measured = encoders.compare(found, data, reference)
        size = weight_bytes(checkpoint.path)
        results.append(ClassifierEvaluation(checkpoint.label, against, size, parameters, measured))
        reference = reference or found
    return results


def _require_same_vocabulary(checkpoint: Checkpoint, layout: Layout, reference: Layout) -> None:
    expected, found = (each.embedding.shape[0] for each in (reference, layout))
    if expected != found:
        raise PlanError(
            f"{checkpoint.label} has a vocabulary of {found} tokens and the reference one of {expected}; "
            "their predictions cannot be compared token by token"
        )


def bench(
    models: Sequence[Model],
    engines: Sequence[str] = (),
    *,
    load: Load | None = None,
    threads: int | None = None,
    progress: Progress = silent,
    trust_remote_code: bool = False,
) -> Bench:
    """How fast models are in engines, and how much memory they take there; see `penjing.engines.bench`.

    engines  "llamacpp", "transformers:float32", ...; none: the one that each model's files are made for
    load     batch sizes, prompt lengths, tokens decoded, rounds

    Raises EngineError when no engine takes any of the models, MissingDependency for an engine that is not installed.
    """
    from penjing.engines import bench as benchmark

    return benchmark.bench(
        models, engines, load=load, threads=threads, progress=progress, trust_remote_code=trust_remote_code
    )


def export(
    model: Model,
    to: str,
    output: str | Path,
    *,
    progress: Progress = silent,
    trust_remote_code: bool = False,
) -> Exported:
    """Write a model in another format with the codes that it has, nothing quantised anew.

    Raises PlanError naming what the format cannot hold and which formats can, before anything is written;
    VerificationError when what was written is not the model that was read.
    """
    from penjing.pipeline import export as exporting

    return exporting.export(model, to, Path(output), progress=progress, trust_remote_code=trust_remote_code)


def serve(
    model: Model,
    *,
    port: int = 8000,
    context: int = 4096,
    threads: int | None = None,
    trust_remote_code: bool = False,
) -> Serving:
    """The commands that serve a model with llama-server, vLLM or transformers; nothing is started."""
    from penjing.engines import serving
    from penjing.engines.process import default_threads

    return serving.serve(
        model, port=port, context=context, threads=threads or default_threads(), trust_remote_code=trust_remote_code
    )
