"""Bytes, bits per weight, peak memory and time: what a run takes and what its result weighs."""

from __future__ import annotations

import gc
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

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


class PeakMemory:
    """Largest resident memory while the block runs, above what was resident when it began.

        with PeakMemory() as memory:
            ...
        memory.bytes        # above the baseline
        memory.total        # the peak itself

    Linux resets the kernel's high-water mark when the block begins. Where that is not allowed, and on macOS, the mark
    is of the whole process: then `exact` is False and an earlier, higher peak hides this one.
    """

    def __init__(self) -> None:
        self.baseline = 0
        self.total = 0
        self.exact = False

    @property
    def bytes(self) -> int:
        return max(self.total - self.baseline, 0)

    def __enter__(self) -> PeakMemory:
        gc.collect()  # garbage that goes away in the middle would hide as much of the peak
        self.exact = _reset_mark()
        self.baseline = _status("VmRSS") or _high_water_mark()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.read()

    def read(self) -> int:
        """Bytes above the baseline up to now."""
        self.total = _high_water_mark()
        return self.bytes


def _reset_mark() -> bool:
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        return True
    return False


def _high_water_mark() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return _status("VmHWM") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _status(key: str) -> int:
    """A size in bytes from /proc/self/status, 0 where there is none."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name == key:
                return int(value.split()[0]) * 1024
    return 0


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
