"""Short recipes and texts for whole runs on tiny models. Shared by the tests of compress, resume and bad input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from penjing import api
from penjing.evaluation.report import Report
from penjing.pipeline import job
from tiny_models import TEXT

SAMPLES, LENGTH = 4, 32


def texts(folder: Path) -> dict[str, Any]:
    """The `calibration` and `evaluation` sections of a recipe, with their files written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "calibration.txt").write_text("\n".join(TEXT * 8), encoding="utf-8")
    (folder / "evaluation.txt").write_text("\n".join(reversed(TEXT * 4)), encoding="utf-8")
    return {
        "calibration": {"data": str(folder / "calibration.txt"), "samples": SAMPLES, "length": LENGTH},
        "evaluation": {"data": str(folder / "evaluation.txt"), "windows": 2, "length": LENGTH},
    }


def recipe(texts: dict[str, Any], *steps: dict[str, Any], **keys: Any) -> dict[str, Any]:
    """A recipe of `steps` on short texts."""
    return {"version": 1, "steps": list(steps), **texts, **keys}


def compress(
    model: Path,
    wanted: dict[str, Any],
    output: Path,
    *,
    engine: bool = False,
    arithmetic: torch.dtype = torch.float32,
    **options: Any,
) -> Report:
    """`api.compress` with the same arithmetic on every machine.

    Without `engine`, the result is read back by Penjing only, which saves a process.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "compute_dtype", lambda: arithmetic)
        if not engine:
            patch.setattr(job, "fits_in_memory", lambda parameters: False)
        return api.compress(model, wanted, output, **options)


class Killed(BaseException):
    """Stands in for the signal where a whole process would be too slow."""


def stopped_before_the_walk(model: Path, wanted: dict[str, Any], output: Path) -> None:
    """A run that is killed once its text and its recipe are ready."""

    def stop(*_: object) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(job, "run_stages", stop)
        compress(model, wanted, output, evaluated=False)


def penjing(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own."""
    command = [sys.executable, "-m", "penjing", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


def shards(directory: Path) -> dict[str, bytes]:
    """Everything a model directory holds that must not depend on when the run was interrupted."""
    files = [*directory.glob("*.safetensors"), *directory.glob("*.safetensors.index.json"), directory / "config.json"]
    return {file.name: file.read_bytes() for file in files}
