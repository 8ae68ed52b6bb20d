"""The table of engines, and which of them a model goes to."""

from __future__ import annotations

import difflib
from pathlib import Path

from penjing.checkpoint import open_checkpoint
from penjing.engines.base import Engine
from penjing.engines.llamacpp import LlamaCpp
from penjing.engines.llamaserver import LlamaServer
from penjing.engines.onnxruntime import OnnxRuntime, holds_graph_weights, onnx_file
from penjing.engines.transformers import Transformers
from penjing.engines.vllm import VLLM
from penjing.errors import CheckpointError, EngineError, MissingDependency

ENGINES: dict[str, Engine] = {
    engine.name: engine for engine in (Transformers(), LlamaCpp(), LlamaServer(), OnnxRuntime(), VLLM())
}
"""Every engine, by the name that `--engine` takes."""


def engine_named(name: str) -> Engine:
    """The engine called `name`. Raises EngineError for an unknown one, MissingDependency for one not installed."""
    if name not in ENGINES:
        close = difflib.get_close_matches(name, ENGINES, 1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise EngineError(f"no engine called {name!r}; there are {', '.join(ENGINES)}{hint}")
    engine = ENGINES[name]
    if engine.version() is None:
        raise MissingDependency(f"the engine {name} is not installed: {engine.install}")
    return engine


def engine_for(path: Path, name: str | None = None) -> Engine:
    """The engine that `name` asks for, or the one that the files at `path` are made for.

    Raises EngineError when it does not load such files, MissingDependency when it is not installed.
    """
    engine = engine_named(name or _by_files(path))
    if refusal := engine.refusal(path):
        raise EngineError(refusal)
    return engine


def _by_files(path: Path) -> str:
    if path.suffix == ".gguf":
        there = [name for name in ("llamacpp", "llama-server") if ENGINES[name].version() is not None]
        return next(iter(there), "llamacpp")
    if onnx_file(path) is None:
        return "transformers"
    for_transformers = path.is_dir() and any(path.glob("*.safetensors")) and not holds_graph_weights(path)
    return "transformers" if for_transformers else "onnxruntime"


def model_path(model: str | Path, *, trust_remote_code: bool = False) -> Path:
    """Where the files of a model lie: `demo`, a directory, a file, or a hub id, downloaded if need be.

    A directory that holds one GGUF file and no other weights stands for that file. Raises CheckpointError when there
    is nothing.
    """
    path = Path(model).expanduser()
    if model != "demo" and onnx_file(path) is not None:
        return path
    if model != "demo" and path.is_dir() and not any(path.glob("*.safetensors")):
        files = sorted(path.glob("*.gguf"))
        if len(files) > 1:
            raise CheckpointError(f"{path} holds {len(files)} GGUF files; name one of them")
        if files:
            return files[0]
    return open_checkpoint(model, trust_remote_code=trust_remote_code).path
