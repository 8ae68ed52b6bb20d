"""Commands that serve a model. Serving is the engines' own job; they do it better than a wrapper would."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from penjing.checkpoint.directory import read_config
from penjing.engines.onnxruntime import onnx_file
from penjing.engines.table import ENGINES, model_path
from penjing.errors import EngineError
from penjing.formats import format_of


@dataclass(frozen=True)
class Command:
    """One way to serve a model: the command line, and what to know about it."""

    engine: str
    command: str
    note: str = ""


@dataclass(frozen=True)
class Serving:
    """All of them for one model; each offers an interface like OpenAI's at `address`."""

    model: str
    address: str
    commands: tuple[Command, ...]

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def serve(
    model: str | Path, *, port: int = 8000, context: int = 4096, threads: int = 1, trust_remote_code: bool = False
) -> Serving:
    """How to serve a model with the engines that load it. Raises EngineError for files that no server reads."""
    path = model_path(model, trust_remote_code=trust_remote_code)
    commands = [
        *_gguf(path, port, context, threads),
        *_vllm(path, port, context, trust_remote_code),
        *_transformers(path, port, trust_remote_code),
    ]
    if not commands:
        what = "ONNX Runtime has no server of its own" if onnx_file(path) is not None else "no server reads its files"
        raise EngineError(f"{model}: {what}; export it as gguf for llama-server, or as compressed-tensors for vLLM")
    return Serving(str(model), f"http://127.0.0.1:{port}/v1", tuple(commands))


def _gguf(path: Path, port: int, context: int, threads: int) -> list[Command]:
    if path.suffix != ".gguf":
        return []
    words = ["llama-server", "--model", str(path), "--port", str(port), "--ctx-size", str(context)]
    words += ["--threads", str(threads)]
    python = ["python", "-m", "llama_cpp.server", "--model", str(path), "--port", str(port)]
    python += ["--n_ctx", str(context), "--n_threads", str(threads)]
    return [
        Command("llama.cpp", shlex.join(words), "" if ENGINES["llama-server"].version() else "not on the PATH here"),
        Command("llama-cpp-python", shlex.join(python), "needs pip install 'llama-cpp-python[server]'"),
    ]


def _vllm(path: Path, port: int, context: int, trust_remote_code: bool) -> list[Command]:
    if ENGINES["vllm"].refusal(path) is not None:
        return []
    words = ["vllm", "serve", str(path), "--port", str(port), "--max-model-len", str(context)]
    words += ["--trust-remote-code"] if trust_remote_code else []
    note = "" if ENGINES["vllm"].version() else "vLLM is not installed here; this was not tried"
    return [Command("vllm", shlex.join(words), note)]


def _transformers(path: Path, port: int, trust_remote_code: bool) -> list[Command]:
    if not path.is_dir() or ENGINES["transformers"].refusal(path) is not None:
        return []
    words = ["transformers", "serve", str(path), "--port", str(port)]
    words += ["--trust-remote-code"] if trust_remote_code else []
    native = format_of(read_config(path, trust_remote_code)).name == "native"
    if not native:
        return [Command("transformers", shlex.join(words), "needs pip install 'transformers[serving]'")]
    program = (
        "import penjing, sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
    )
    return [
        Command(
            "transformers",
            shlex.join(["python", "-c", program, *words[1:]]),
            "the native format needs `import penjing` in the server; needs pip install 'transformers[serving]'",
        )
    ]
