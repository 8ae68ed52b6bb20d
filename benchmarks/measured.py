"""Run a command in a process of its own and say how long it took and how much memory it needed at its peak."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

_POLL = 0.05  # seconds


@dataclass(frozen=True)
class Measured:
    """Wall-clock seconds and peak resident bytes of one process, its children apart (Linux).

    processor  seconds that processors worked for it and for the children that it waited for: what others do on the same
               machine hardly changes them
    """

    seconds: float
    peak: int
    processor: float


def run(command: Sequence[str], log: Path, **environment: str) -> Measured:
    """Run to the end; output goes to `log`. Raises RuntimeError with its last lines when the command fails.

    The kernel's high-water mark is read while the process lives: what the kernel says of it afterwards includes the
    processes that it started itself, such as the one that loads a result to verify it.
    """
    start = time.perf_counter()
    peak, before = 0, _processor_seconds()
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | environment)
        while process.poll() is None:
            peak = max(peak, _high_water_mark(process.pid))
            time.sleep(_POLL)
    seconds = time.perf_counter() - start
    if process.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise RuntimeError(f"{' '.join(command)} failed:\n{tail}")
    return Measured(seconds, peak, _processor_seconds() - before)


def _high_water_mark(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")), 0)


def _processor_seconds() -> float:
    """Of all children that were waited for so far, and theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


@lru_cache
def import_baseline(python: str = sys.executable) -> int:
    """Peak bytes of a process that only imports torch and transformers: what no tool can go below."""
    code = "import torch, transformers.models.llama.modeling_llama; from transformers import AutoModelForCausalLM"
    return run([python, "-c", code], Path(os.devnull)).peak
