"""How fast models are in engines: prefill, decode, loading, memory, and what reading the weights alone would take.

Every model stays loaded in a process of its own, and rounds go over all of them in turn, so that what else the machine
does falls on all alike. The first round warms up and is not counted.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from penjing.engines.base import LoadRequest, Timing
from penjing.engines.process import EngineProcess, default_threads
from penjing.engines.table import engine_for, engine_named, model_path
from penjing.errors import EngineError, PenjingError
from penjing.evaluation.size import weight_bytes
from penjing.progress import Progress


@dataclass(frozen=True)
class Load:
    """What is measured: every batch size at every prompt length, `steps` tokens decoded after each prompt."""

    batches: tuple[int, ...] = (1,)
    lengths: tuple[int, ...] = (128, 512)
    steps: int = 32
    rounds: int = 5
    seed: int = 0


@dataclass(frozen=True)
class Spread:
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Of one value or more."""
        if len(values) == 1:
            return Spread(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return Spread(median, low, high)


@dataclass(frozen=True)
class Speed:
    """Tokens per second of all sequences together, at one batch size and prompt length."""

    batch: int
    length: int
    prefill: Spread
    decode: Spread


@dataclass(frozen=True)
class Row:
    """One model in one engine.

    file_bytes       of the weight files
    load_seconds     imports of the engine apart
    peak_memory      resident bytes of the engine's process
    above_libraries  of these, what came with the model
    read_per_token   bytes of weights that a decoded token reads; None where unknown
    ceiling          decoded tokens per second if nothing took time but reading these; None likewise
    """

    model: str
    engine: str
    version: str
    dtype: str
    file_bytes: int
    load_seconds: float
    peak_memory: int
    above_libraries: int
    read_per_token: int | None
    ceiling: float | None
    speeds: tuple[Speed, ...]


@dataclass(frozen=True)
class Bench:
    """What `bench` measured.

    bandwidth  bytes per second that `threads` threads read from memory
    skipped    models that an engine does not take, and why
    """

    threads: int
    bandwidth: float
    load: Load
    rows: tuple[Row, ...]
    skipped: tuple[str, ...] = field(default=())

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


@dataclass(frozen=True)
class _Entrant:
    """A model, the engine it goes to and the dtype it is loaded in."""

    model: str
    path: Path
    engine: str
    dtype: str


def bench(
    models: Iterable[str | Path],
    engines: Sequence[str] = (),
    *,
    load: Load | None = None,
    threads: int | None = None,
    progress: Progress,
    trust_remote_code: bool = False,
) -> Bench:
    """Measure every model in every engine that takes it.

    engines  "llamacpp", "transformers:float32", ...; none: the one that each model's files are made for
    Raises EngineError when no engine takes any model, or a loaded one fails.
    """
    load, threads = load or Load(), threads or default_threads()
    entrants, skipped = _entrants(models, engines, trust_remote_code)
    bandwidths = []
    times: list[dict[tuple[int, int], list[Timing]]] = [{} for _ in entrants]
    with ExitStack() as stack:
        running = []
        for number, entrant in enumerate(entrants):
            progress("load", number, len(entrants), f"{entrant.model} in {entrant.engine}")
            request = LoadRequest(
                entrant.path,
                entrant.dtype,
                threads,
                max(load.lengths) + load.steps,
                max(load.batches),
                trust_remote_code,
            )
            running.append(stack.enter_context(EngineProcess(entrant.engine, request)))
        progress("load", len(entrants), len(entrants), "")
        for number in range(load.rounds + 1):
            progress("rounds", number, load.rounds + 1, "warming up" if number == 0 else "")
            bandwidths.append(read_bandwidth(threads))
            for process, found in zip(running, times, strict=True):
                _round(process, load, found if number else {})
        progress("rounds", load.rounds + 1, load.rounds + 1, "")
        bandwidth = statistics.median(bandwidths)
        rows = tuple(
            _row(entrant, process, found, bandwidth)
            for entrant, process, found in zip(entrants, running, times, strict=True)
        )
    return Bench(threads, bandwidth, load, rows, tuple(skipped))


def _entrants(
    models: Iterable[str | Path], engines: Sequence[str], trust_remote_code: bool
) -> tuple[list[_Entrant], list[str]]:
    entrants, skipped, first = [], [], None
    for name in engines:
        engine_named(name.partition(":")[0])
    for model in models:
        path = model_path(model, trust_remote_code=trust_remote_code)
        for wanted in engines or ("",):
            name, _, dtype = wanted.partition(":")
            try:
                engine = engine_for(path, name or None)
            except PenjingError as error:
                first = first or error
                skipped.append(str(error))
                continue
            entrants.append(_Entrant(str(model), path, engine.name, dtype or "auto"))
    if not entrants:
        raise first or EngineError("no model was named")
    return entrants, skipped


def _round(process: EngineProcess, load: Load, found: dict[tuple[int, int], list[Timing]]) -> None:
    """One timing at every batch size and prompt length."""
    import numpy as np

    draw = np.random.default_rng(load.seed)
    for batch in load.batches:
        for length in load.lengths:
            tokens = draw.integers(0, process.vocabulary, (batch, length), dtype=np.int64)
            found.setdefault((batch, length), []).append(process.time(tokens, load.steps))


def _row(
    entrant: _Entrant, process: EngineProcess, times: dict[tuple[int, int], list[Timing]], bandwidth: float
) -> Row:
    memory = process.memory()
    speeds = tuple(
        Speed(
            batch,
            length,
            Spread.of([batch * length / timing.prefill for timing in timings]),
            Spread.of([batch / timing.step for timing in timings]),
        )
        for (batch, length), timings in times.items()
    )
    reads = process.read_per_token
    return Row(
        model=entrant.model,
        engine=entrant.engine,
        version=engine_named(entrant.engine).version() or "",
        dtype=entrant.dtype,
        file_bytes=weight_bytes(entrant.path),
        load_seconds=process.seconds,
        peak_memory=memory["peak"],
        above_libraries=memory["above_libraries"],
        read_per_token=reads,
        ceiling=bandwidth / reads if reads else None,
        speeds=speeds,
    )


def read_bandwidth(threads: int, size: int = 2**28, repeats: int = 3) -> float:
    """Bytes per second at which `threads` threads read an array too large for caches; the best of some repeats."""
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np

    parts = np.array_split(np.ones(size // 4, dtype=np.float32), threads)
    rates = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            started = time.perf_counter()
            list(pool.map(np.max, parts))
            rates.append(size / (time.perf_counter() - started))
    return max(rates)
