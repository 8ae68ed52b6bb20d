"""Bytes, bits per weight and time: what a result weighs and how long it took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_WEIGHT_SUFFIXES = (".safetensors", ".gguf")


def weight_bytes(path: str | Path) -> int:
    """Bytes of the weight files of a model directory, or of one file."""
    path = Path(path)
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.suffix in _WEIGHT_SUFFIXES)


def bits_per_weight(total_bytes: int, parameters: int) -> float:
    """Bits on disk per parameter, everything that is stored included."""
    return 8 * total_bytes / parameters


def readable_bytes(count: float) -> str:
    """Bytes in powers of ten, as disks are sold: "81.3 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def readable_seconds(seconds: float) -> str:
    """Seconds as people say them: "42 s", "3 min 12 s", "2 h 5 min"."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


class Stages:
    """Wall time by stage; a stage entered again adds to its time.

    stages = Stages()
    with stages.stage("calibrate"):
        ...
    stages.seconds      # {"calibrate": 12.3}
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block under `name`, also when it raises."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - begun
