"""The process that an engine runs in: started by `EngineProcess`, told what to do over a socket.

    python -m penjing.engines.worker DESCRIPTOR ENGINE

A request is (name of a function in `_Worker`, arguments). The answer is ("ok", result), ("missing", message) where a
package has to be installed first, ("error", message) for what else Penjing raises on purpose, or ("bug", message); an
answer in pieces is any number of ("item", piece) before "ok".
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from penjing.engines.base import LoadedModel, LoadRequest, Sampling, Timing
from penjing.engines.table import ENGINES
from penjing.errors import MissingDependency, PenjingError
from penjing.memory import PeakMemory, high_water_mark

if TYPE_CHECKING:
    import numpy as np


class _Worker:
    """One engine with at most one model."""

    def __init__(self, engine: str) -> None:
        self._engine = ENGINES[engine]
        self._model: LoadedModel | None = None
        self._memory = PeakMemory()

    def load(self, request: LoadRequest) -> dict[str, Any]:
        """Load a model: seconds without those for importing the engine, and what the engine says of it."""
        _import(self._engine.name)
        self._memory.__enter__()
        started = time.perf_counter()
        model = self._engine.load(request)
        seconds = time.perf_counter() - started
        self._model = model
        return {"seconds": seconds, "vocabulary": model.vocabulary, "read_per_token": model.read_per_token}

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        return self._loaded.logits(tokens)

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        return self._loaded.generate(prompt, sampling)

    def time(self, tokens: np.ndarray, steps: int) -> Timing:
        return self._loaded.time(tokens, steps)

    def memory(self) -> dict[str, int]:
        """Peak resident bytes: in all, and above what there was before the model came."""
        above = self._memory.read()
        other = self._loaded.process_id()
        if other is not None:
            return {"peak": high_water_mark(other), "above_libraries": high_water_mark(other)}
        return {"peak": self._memory.total, "above_libraries": above}

    def close(self) -> None:
        if self._model is not None:
            self._model.close()
            self._model = None

    @property
    def _loaded(self) -> LoadedModel:
        if self._model is None:
            raise RuntimeError("no model is loaded")
        return self._model


def _import(engine: str) -> None:
    """Import what the engine is made of, so that loading a model is timed without it."""
    import numpy as np  # noqa: F401

    if engine == "transformers":
        import torch  # noqa: F401
        from transformers import AutoModelForCausalLM  # noqa: F401
    elif engine == "onnxruntime":
        import onnxruntime  # noqa: F401
    elif engine == "vllm":
        import vllm  # noqa: F401
    elif engine == "llamacpp":
        import llama_cpp  # noqa: F401


def serve(connection: Connection, worker: _Worker) -> None:
    """Answer requests until the other side hangs up."""
    while True:
        try:
            name, arguments = connection.recv()
        except EOFError:
            worker.close()
            return
        try:
            answer = getattr(worker, name)(*arguments)
            if isinstance(answer, Iterator):
                for piece in answer:
                    connection.send(("item", piece))
                answer = None
            connection.send(("ok", answer))
        except MissingDependency as error:
            connection.send(("missing", str(error)))
        except PenjingError as error:
            connection.send(("error", str(error)))
        except Exception as error:
            connection.send(("bug", f"{type(error).__name__}: {error}"))


def main(descriptor: str, engine: str) -> None:
    """Take over the socket; what libraries print goes to standard error."""
    os.dup2(2, 1)
    serve(Connection(int(descriptor)), _Worker(engine))


if __name__ == "__main__":
    main(*sys.argv[1:])
