"""Compressing and measuring encoders: models are made one after another, and nothing is walked block by block.

Every step of such a recipe makes another model (trains it, trims its vocabulary). The last one is the result; accuracy
is measured for each on the way, and the result is compared with the model that the recipe started from, or, where that
classified nothing yet, with the first that did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from penjing.checkpoint import Checkpoint, open_checkpoint, write_bytes
from penjing.errors import PlanError
from penjing.evaluation.card import model_card
from penjing.evaluation.classification import Classification, measured
from penjing.evaluation.html import html_page
from penjing.evaluation.report import ModuleRow, Report, Software, Source
from penjing.evaluation.size import Stages, weight_bytes
from penjing.evaluation.windows import load_tokenizer
from penjing.memory import PeakMemory
from penjing.methods.adaptation.classify import class_logits
from penjing.models import layout_of
from penjing.models.families import classes_of, classifies
from penjing.pipeline.journal import FOLDER, Journal
from penjing.pipeline.stages import clear_stages, make
from penjing.pipeline.verification import fits_in_memory, save_probe, verify, whole_answer
from penjing.training.data import padding_of
from penjing.training.models import load_model
from penjing.training.texts import Example, batch_of, read_texts

if TYPE_CHECKING:
    from penjing.pipeline.job import Job
    from penjing.progress import Progress

BATCH = 32
PROBE = (8, 16)
"""Texts and tokens of the random input by which a written model is verified."""


@dataclass(frozen=True)
class Answers:
    """What a classifier says of the evaluation texts: logits fp32 (S, C), their labels, and the tokens that it read."""

    logits: Tensor
    labels: Tensor
    length: int


def answers(checkpoint: Checkpoint, data: str, length: int) -> Answers | None:
    """The answers of a checkpoint to the labelled texts of `data`; None when it has no head for classes.

    Raises CalibrationError for records without text or label.
    """
    if not classifies(checkpoint.config):
        return None
    tokenizer = load_tokenizer(checkpoint.files())
    length = min(length, checkpoint.config.get("max_position_embeddings", length))
    examples = read_texts(data, tokenizer, classes_of(checkpoint.config), length)
    labels = torch.tensor([example.label for example in examples])
    return Answers(class_answers(load_model(checkpoint), examples, padding_of(tokenizer)), labels, length)


@torch.no_grad()
def class_answers(model: Any, examples: Sequence[Example], padding: int) -> Tensor:
    """Logits fp32 (S, C) of a live classifier for examples, those of like length together."""
    order = sorted(range(len(examples)), key=lambda row: len(examples[row].inputs["input_ids"]))
    found: list[Tensor] = [torch.empty(0)] * len(examples)
    for start in range(0, len(order), BATCH):
        rows = order[start : start + BATCH]
        logits = class_logits(model, batch_of([examples[row] for row in rows], padding))
        for row, each in zip(rows, logits, strict=True):
            found[row] = each
    return torch.stack(found)


def compare(model: Answers, data: str, reference: Answers | None) -> Classification:
    """Measures of a model, against a reference where both know as many classes."""
    other = None if reference is None or reference.logits.shape != model.logits.shape else reference.logits
    return measured(model.logits, model.labels, length=model.length, data=Path(data).name, reference=other)


def check(job: Job) -> None:
    """Raise PlanError for a recipe that cannot be measured as it asks."""
    if job.measured and job.recipe.evaluation.data == "builtin":
        raise PlanError(
            "a classifier is measured on labelled texts: set `evaluation: {data: labelled.jsonl}`, or do not evaluate"
        )


def run(job: Job, progress: Progress) -> Report:
    """Make the models of the recipe, write the last, verify and measure it. Raises VerificationError."""
    stages = Stages()
    journal = Journal.open(job.directory, job.fingerprint())
    journal.save()
    chain, made = [job.checkpoint], []
    with PeakMemory() as memory, stages.stage("compress"):
        plans = job.plan.walks
        for number, (after, stage) in enumerate(zip(plans[1:], job.recipe.stages(), strict=False), 1):
            assert stage.remake is not None
            folder = job.directory / FOLDER / f"stage-{number}" / "made"
            made.append(dict(make(folder, job, stage.remake, chain[-1], after, progress)))
            chain.append(open_checkpoint(folder))
    with stages.stage("complete the directory"):
        _complete(job, chain[-1])
    with stages.stage("verify"):
        progress("verify", 0, 1, "")
        verification = verify(job.directory, engine=fits_in_memory(layout_of(chain[-1].config).parameters))
        progress("verify", 1, 1, verification.how)
    with stages.stage("evaluate"):
        classification = _evaluate(job, chain, made, progress) if job.measured else None
    report = _report(job, made, classification, memory, stages, verification.as_dict())
    write_bytes(job.directory / "report.json", report.to_json().encode())
    write_bytes(job.directory / "report.html", html_page(report).encode())
    write_bytes(job.directory / "README.md", model_card(report).encode())
    clear_stages(job.directory)
    journal.close()
    return report


def _complete(job: Job, last: Checkpoint) -> None:
    """The files of the last model, the recipe, and what it answers to a probe."""
    import yaml

    written = []
    for path in sorted(last.path.iterdir()):
        write_bytes(job.directory / path.name, path.read_bytes())
        if path.suffix == ".safetensors" or path.name == "config.json":
            written.append(path.name)
    write_bytes(job.directory / "recipe.yaml", yaml.safe_dump(job.recipe.as_dict(), sort_keys=False).encode())
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(last.config["vocab_size"], PROBE, generator=generator)
    save_probe(job.directory, tokens, whole_answer(last, tokens), written)


def _evaluate(
    job: Job, chain: Sequence[Checkpoint], made: Sequence[dict[str, Any]], progress: Progress
) -> Classification | None:
    """The result against the first of the chain that classifies; `made` learns the accuracy of each on the way."""
    wanted = job.recipe.evaluation
    found: list[Answers | None] = []
    for number, checkpoint in enumerate(chain):
        progress("evaluate", number, len(chain), checkpoint.label)
        same = classes_of(checkpoint.config) == classes_of(chain[-1].config)
        found.append(answers(checkpoint, wanted.data, wanted.length) if same else None)
    progress("evaluate", len(chain), len(chain), "")
    for entry, each in zip(made, found[1:], strict=True):
        if each is not None:
            entry["accuracy"] = compare(each, wanted.data, None).accuracy
    last = found[-1]
    reference = next((each for each in found if each is not None), None)
    return None if last is None else compare(last, wanted.data, None if reference is last else reference)


def _report(
    job: Job,
    made: Sequence[dict[str, Any]],
    classification: Classification | None,
    memory: PeakMemory,
    stages: Stages,
    verification: dict[str, Any],
) -> Report:
    plan = job.plan
    layouts = [layout_of(open_checkpoint(job.directory).config)]
    parameters = [walk.layout.parameters for walk in plan.walks[1:]]
    modules = tuple(
        ModuleRow(
            name=row.module.name,
            kind=row.module.kind,
            block=row.module.block,
            shape=row.module.shape,
            steps=(),
            scheme="dense",
            bits=None,
            predicted_bytes=row.bytes,
            bytes=row.bytes,
        )
        for row in plan.rows
        if "weight" in row.module.tensors and row.module in layouts[0].modules
    )
    return Report(
        recipe=job.recipe.as_dict(),
        format=plan.format.name,
        source=Source(
            label=job.checkpoint.label,
            fingerprint=job.checkpoint.fingerprint(),
            model_type=job.layout.model_type,
            parameters=job.layout.parameters,
            bytes=plan.source_bytes,
            dtype=str(plan.dtype).removeprefix("torch."),
        ),
        modules=modules,
        predicted_bytes=plan.bytes,
        bytes=sum(weight_bytes(path) for path in job.directory.glob("*.safetensors")),
        software=Software.here(),
        classification=classification,
        made=tuple({**entry, "parameters": count} for entry, count in zip(made, parameters, strict=True)),
        peak_memory=memory.bytes,
        seconds=stages.seconds,
        verification=verification,
    )
