"""An engine in a process of its own, and what to say when that process dies."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import TYPE_CHECKING, Any

from penjing.engines.base import LoadRequest, Sampling, Timing
from penjing.errors import EngineError, MissingDependency

if TYPE_CHECKING:
    import numpy as np

BUILD_AROUND = (
    "the build of llama.cpp does not suit this processor (native builds of llama-cpp-python 0.3.36 crash where there "
    'is AMX). Build it without: CMAKE_ARGS="-DGGML_NATIVE=OFF -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AVX2=ON '
    '-DGGML_FMA=ON -DGGML_F16C=ON" pip install --no-cache-dir --force-reinstall llama-cpp-python '
    "(leave the AVX512 options out on a processor without AVX-512)"
)

_CRASHES = (signal.SIGSEGV, signal.SIGILL, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE)


class EngineProcess:
    """A model loaded in an engine. Use it as a context manager: leaving it ends the process.

        with EngineProcess("llamacpp", LoadRequest(path)) as model:
            logits = model.logits(tokens)

    seconds         that loading took, imports apart
    vocabulary      number of logits
    read_per_token  bytes of weights that one decoded token reads, where known

    Raises EngineError with what the engine said, or with how its process died; MissingDependency where it named a
    package that it needs.
    """

    def __init__(self, engine: str, request: LoadRequest) -> None:
        self.engine, self.request = engine, request
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed by `close`
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "penjing.engines.worker", str(theirs.fileno()), engine]
            environment = os.environ | {"OMP_NUM_THREADS": str(request.threads)}
            self._process = subprocess.Popen(
                command, stderr=self._stderr, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()], env=environment
            )
        self._connection = Connection(ours.detach())
        try:
            loaded = self._ask("load", request)
        except BaseException:
            self.close()
            raise
        self.seconds: float = loaded["seconds"]
        self.vocabulary: int = loaded["vocabulary"]
        self.read_per_token: int | None = loaded["read_per_token"]

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Token windows int64 (B, T) -> fp32 (B, T, V)."""
        return self._ask("logits", tokens)

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """Tokens as they are made."""
        return self._answers("generate", prompt, sampling)

    def time(self, tokens: np.ndarray, steps: int) -> Timing:
        """Read prompts (B, T), then append `steps` tokens to each."""
        return self._ask("time", tokens, steps)

    def memory(self) -> dict[str, int]:
        """Peak resident bytes: `peak` in all, `above_libraries` beyond what importing the engine took."""
        return self._ask("memory")

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._stderr.close()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _ask(self, name: str, *arguments: Any) -> Any:
        answers = self._answers(name, *arguments)
        while True:
            try:
                next(answers)
            except StopIteration as done:
                return done.value

    def _answers(self, name: str, *arguments: Any) -> Iterator[Any]:
        """Pieces of an answer as they come; the final result is the generator's value."""
        try:
            self._connection.send((name, arguments))
            while True:
                kind, value = self._connection.recv()
                if kind == "item":
                    yield value
                elif kind == "ok":
                    return value
                elif kind == "missing":
                    raise MissingDependency(value)
                elif kind == "error":
                    raise EngineError(value)
                else:
                    raise EngineError(f"{self.engine} failed on {self.request.path}: {value}{self._last_words()}")
        except (EOFError, ConnectionError, BrokenPipeError) as error:
            raise EngineError(self._how_it_died()) from error

    def _how_it_died(self) -> str:
        code = self._process.wait(20)
        died = f"{self.engine} died on {self.request.path} "
        if code < 0 and -code in _CRASHES:
            died += f"({signal.Signals(-code).name})"
            return f"{died}: {BUILD_AROUND}" if self.engine == "llamacpp" else died + self._last_words()
        if code == -signal.SIGKILL:
            return died + "(killed, most likely for want of memory): take a smaller context or batch"
        return f"{died}(exit code {code}){self._last_words()}"

    def _last_words(self) -> str:
        self._stderr.seek(0)
        lines = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
        return f"; it said last: {lines[-1]}" if lines else ""


def default_threads() -> int:
    """OMP_NUM_THREADS, or one per core that this process may use."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    if given.isdigit() and int(given) > 0:
        return int(given)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
