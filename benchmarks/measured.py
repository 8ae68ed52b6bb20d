"""Run a command in a process of its own and say how long it took and how much memory it needed at its peak."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path


@dataclass(frozen=True)
class Measured:
    """Wall-clock seconds and peak resident bytes of one process (its children apart)."""

    seconds: float
    peak: int


def run(command: Sequence[str], log: Path, **environment: str) -> Measured:
    """Run to the end; output goes to `log`. Raises RuntimeError with its last lines when the command fails."""
    start = time.perf_counter()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment)
        _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{' '.join(command)} failed:\n{tail}")
    return Measured(seconds, usage.ru_maxrss * 1024)


@lru_cache
def import_baseline(python: str = sys.executable) -> int:
    """Peak bytes of a process that only imports torch and transformers: what no tool can go below."""
    code = "import torch, transformers.models.llama.modeling_llama; from transformers import AutoModelForCausalLM"
    return run([python, "-c", code], Path(os.devnull)).peak
