"""A stage whose model is made by training: from a recipe's step to the one loop, and what the report says of it."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from penjing.checkpoint import open_checkpoint
from penjing.methods.pruning.loraprune import TrainedCut
from penjing.methods.training import Trained, TrainFunction, TrainOptions
from penjing.pipeline.cutting import cut_units
from penjing.training.stage import TrainStage

if TYPE_CHECKING:
    from penjing.pipeline.stages import RemakeTask

POINTS = 1000
"""Points of the loss curve that the report keeps."""


def make_trained(task: RemakeTask) -> Mapping[str, Any]:
    """Train the stage's model into `task.directory`; the state of an unfinished training lies beside it."""
    remake = task.step.definition.remake
    assert isinstance(remake, Trained)
    return _train(task, remake.start, task.config, task.directory)


def make_trained_cut(task: RemakeTask) -> Mapping[str, Any]:
    """Train the stage's model until some of its units are zero, and remove those."""
    remake = task.step.definition.remake
    assert isinstance(remake, TrainedCut)
    masked = task.directory.with_name("masked")
    said = _train(task, remake.start, task.source.config, masked)
    source = open_checkpoint(masked, trust_remote_code=task.trust_remote_code)
    kept = cut_units(replace(task, source=source))
    shutil.rmtree(masked)
    return {**said, **kept}


def _train(task: RemakeTask, start: TrainFunction, config: Mapping[str, Any], directory: Path) -> Mapping[str, Any]:
    options = task.step.options
    assert isinstance(options, TrainOptions)
    named = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    stage = TrainStage(
        source=task.source,
        original=task.original,
        tokens=task.tokens,
        config=config,
        dtype=getattr(torch, named.removeprefix("torch.")),
        sparse=bool(task.zeros),
        trust_remote_code=task.trust_remote_code,
    )
    work = task.directory.parent / "training"
    curve = stage.run(task.step.method, start, options, directory, work, task.progress)
    every = -(-len(curve.steps) // POINTS)
    return {
        "curve": {"steps": list(curve.steps[::every]), "losses": list(curve.losses[::every])},
        "seconds": round(sum(curve.seconds), 1),
    }
