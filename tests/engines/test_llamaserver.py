"""llama-server, driven over HTTP; a stand-in that speaks its protocol takes its place."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from penjing.engines import ENGINES, LoadRequest, Sampling
from penjing.errors import EngineError

STAND_IN = """#!{python}
import json, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

if "--version" in sys.argv:
    print("version: 4711 (abcdef)", file=sys.stderr)
    sys.exit(0)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer(b"{{}}")

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if len(asked["prompt"]) > 20:
            self.send_response(400)
            self.end_headers()
            self.wfile.write(b"the prompt is too long")
            return
        last, count = asked["prompt"][-1], asked["n_predict"]
        tokens = [last + place + 1 for place in range(count)]
        if asked.get("stream"):
            events = [{{"tokens": [token], "stop": False}} for token in tokens] + [{{"tokens": [], "stop": True}}]
            self.answer(b"".join(b"data: " + json.dumps(event).encode() + b"\\n\\n" for event in events))
        else:
            self.answer(json.dumps({{"timings": {{"prompt_ms": 50.0, "predicted_per_token_ms": 20.0}}}}).encode())

    def answer(self, body):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


HTTPServer(("127.0.0.1", int(sys.argv[sys.argv.index("--port") + 1])), Handler).serve_forever()
"""


@pytest.fixture
def on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    program = tmp_path / "bin" / "llama-server"
    program.parent.mkdir()
    program.write_text(STAND_IN.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(program.parent))
    return program


@pytest.fixture
def model(tiny_model: Callable[..., Path], tmp_path: Path) -> Path:
    pytest.importorskip("gguf")
    from tiny_engines import write_gguf

    return write_gguf(tiny_model("qwen3"), tmp_path / "tiny.gguf")


def test_answers_times_and_refusals(on_the_path: Path, model: Path) -> None:
    engine = ENGINES["llama-server"]
    assert engine.version() == "4711 (abcdef)"
    loaded = engine.load(LoadRequest(model))
    try:
        assert list(loaded.generate([5, 6], Sampling(tokens=4))) == [7, 8, 9, 10]
        assert list(loaded.generate([5, 6], Sampling(tokens=4, stop=(9,)))) == [7, 8]
        timing = loaded.time(np.array([[1, 2, 3]]), 4)
        assert (timing.prefill, timing.step) == (0.05, 0.02)
        assert loaded.vocabulary == 300
        with pytest.raises(EngineError, match="gives no logits"):
            loaded.logits(np.array([[1]]))
        with pytest.raises(EngineError, match="batch 1 only"):
            loaded.time(np.array([[1], [2]]), 4)
        with pytest.raises(EngineError, match="the prompt is too long"):
            list(loaded.generate(list(range(30)), Sampling()))
    finally:
        loaded.close()
    assert loaded._server.poll() is not None  # type: ignore[attr-defined]


def test_a_server_that_ends_at_once(on_the_path: Path, model: Path) -> None:
    on_the_path.write_text(f"#!{sys.executable}\nraise SystemExit(9)\n")
    with pytest.raises(EngineError, match="ended with code 9"):
        ENGINES["llama-server"].load(LoadRequest(model))
