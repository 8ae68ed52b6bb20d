"""A stage whose model is made by training: from a recipe's step to the one loop, and what the report says of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from penjing.methods.training import Trained, TrainOptions
from penjing.training.stage import TrainStage

if TYPE_CHECKING:
    from penjing.pipeline.stages import RemakeTask

POINTS = 1000
"""Points of the loss curve that the report keeps."""


def make_trained(task: RemakeTask) -> Mapping[str, Any]:
    """Train the stage's model into `task.directory`; the state of an unfinished training lies beside it."""
    remake, options = task.step.definition.remake, task.step.options
    assert isinstance(remake, Trained) and isinstance(options, TrainOptions)
    named = str(task.config.get("dtype") or task.config.get("torch_dtype") or "float32")
    stage = TrainStage(
        source=task.source,
        original=task.original,
        tokens=task.tokens,
        config=task.config,
        dtype=getattr(torch, named.removeprefix("torch.")),
        sparse=bool(task.zeros),
        trust_remote_code=task.trust_remote_code,
    )
    work = task.directory.parent / "training"
    curve = stage.run(task.step.method, remake.start, options, task.directory, work, task.progress)
    every = -(-len(curve.steps) // POINTS)
    return {
        "curve": {"steps": list(curve.steps[::every]), "losses": list(curve.losses[::every])},
        "seconds": round(sum(curve.seconds), 1),
    }
