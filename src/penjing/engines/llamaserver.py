"""A `llama-server` that the user has on the PATH, over its HTTP interface on this machine.

It answers and says how long it took; it does not give logits.
"""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penjing.checkpoint.gguf_header import read_gguf_header
from penjing.engines.base import LoadedModel, LoadRequest, Sampling, Timing
from penjing.engines.llamacpp import gguf_read_per_token, gguf_refusal
from penjing.errors import EngineError

if TYPE_CHECKING:
    import numpy as np

PROGRAM = "llama-server"
_SECONDS_TO_START = 600

_HERE = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""This machine is reached directly, whatever proxy the environment names."""


class LlamaServer:
    """One GGUF file, served."""

    name = "llama-server"
    summary = "the llama-server on the PATH; GGUF files"
    install = "install llama.cpp so that `llama-server` is on the PATH (https://github.com/ggml-org/llama.cpp)"
    formats = frozenset({"gguf"})
    tolerance = 0.02

    def version(self) -> str | None:
        """What `llama-server --version` calls itself."""
        if shutil.which(PROGRAM) is None:
            return None
        done = subprocess.run([PROGRAM, "--version"], capture_output=True, text=True, check=False)
        lines = [line for line in (done.stderr + done.stdout).splitlines() if line.startswith("version")]
        return lines[0].partition(":")[2].strip() if lines else "unknown"

    def refusal(self, path: Path) -> str | None:
        """Anything but a GGUF file."""
        return gguf_refusal(path, PROGRAM)

    def load(self, request: LoadRequest) -> LoadedModel:
        """Start a server on a free port of this machine."""
        return LlamaServerModel(request)


class LlamaServerModel(LoadedModel):
    """A running server, stopped by `close`."""

    def __init__(self, request: LoadRequest) -> None:
        header = read_gguf_header(request.path)
        sizes = {name: tensor.nbytes for name, tensor in header.tensors.items()}
        self.read_per_token = gguf_read_per_token(header.keys, sizes)
        self.vocabulary = len(header.keys.get("tokenizer.ggml.tokens", ()))
        self._batch = request.batch
        port = _free_port()
        self._address = f"http://127.0.0.1:{port}"
        command = [PROGRAM, "--model", str(request.path), "--port", str(port), "--threads", str(request.threads)]
        command += ["--ctx-size", str(request.context * request.batch), "--parallel", str(request.batch)]
        self._server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        self._wait(request.path)

    def _wait(self, path: Path) -> None:
        until = time.monotonic() + _SECONDS_TO_START
        while time.monotonic() < until:
            if self._server.poll() is not None:
                code = self._server.returncode
                raise EngineError(f"{path}: {PROGRAM} ended with code {code}; run it by hand to see why")
            try:
                with _HERE.open(f"{self._address}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.05)
        self.close()
        raise EngineError(f"{path}: {PROGRAM} did not come up within {_SECONDS_TO_START} s")

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Never: raises EngineError."""
        raise EngineError(f"{PROGRAM} gives no logits; its answers can be compared token by token")

    def generate(self, prompt: Sequence[int], sampling: Sampling) -> Iterator[int]:
        """See `LoadedModel`."""
        asked = self._question(prompt, sampling.tokens) | {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 0,
            "min_p": 0,
            "seed": sampling.seed,
            "stream": True,
        }
        with self._ask(asked) as answer:
            for line in answer:
                if not line.startswith(b"data: "):
                    continue
                event = json.loads(line.removeprefix(b"data: "))
                for token in event.get("tokens", ()):
                    if token in sampling.stop:
                        return
                    yield token

    def time(self, tokens: np.ndarray, steps: int) -> Timing:
        """See `LoadedModel`; by the server's own clock. Raises EngineError for more than one prompt."""
        if len(tokens) != 1:
            raise EngineError(f"{PROGRAM} is timed at batch 1 only")
        asked = self._question(tokens[0].tolist(), steps + 1) | {"temperature": 0, "ignore_eos": True}
        with self._ask(asked) as answer:
            said = json.load(answer)["timings"]
        return Timing(said["prompt_ms"] / 1000, said["predicted_per_token_ms"] / 1000)

    def _question(self, prompt: Sequence[int], count: int) -> dict[str, Any]:
        return {"prompt": list(prompt), "n_predict": count, "cache_prompt": False, "return_tokens": True}

    def _ask(self, question: dict[str, Any]) -> Any:
        body = json.dumps(question).encode()
        request = urllib.request.Request(f"{self._address}/completion", body, {"Content-Type": "application/json"})
        try:
            return _HERE.open(request)
        except urllib.error.HTTPError as error:
            raise EngineError(f"{PROGRAM} refuses: {error.read().decode('utf-8', 'replace')[:200]}") from error

    def process_id(self) -> int | None:
        """The server's."""
        return self._server.pid

    def close(self) -> None:
        """Stop the server."""
        self._server.terminate()
        try:
            self._server.wait(10)
        except subprocess.TimeoutExpired:
            self._server.kill()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
