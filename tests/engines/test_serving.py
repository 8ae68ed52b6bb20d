"""Commands that serve: one per server that reads the files, nothing started."""

from collections.abc import Callable
from pathlib import Path

import pytest

import penjing
from penjing.errors import EngineError


def test_gguf(tmp_path: Path) -> None:
    (tmp_path / "a model.gguf").touch()
    served = penjing.serve(tmp_path, port=9000, context=512, threads=3)
    first = served.commands[0].command
    assert first.startswith("llama-server --model '")
    assert first.endswith("a model.gguf' --port 9000 --ctx-size 512 --threads 3")
    assert served.address == "http://127.0.0.1:9000/v1"


def test_directories(tiny_model: Callable[..., Path]) -> None:
    commands = {command.engine: command for command in penjing.serve(tiny_model("llama")).commands}
    assert set(commands) == {"vllm", "transformers"}
    assert commands["vllm"].command.startswith("vllm serve ")


def test_the_native_format_needs_penjing_in_the_server(tmp_path: Path, tiny_model: Callable[..., Path]) -> None:
    penjing.compress(
        tiny_model("llama"), {"steps": [{"method": "rtn"}], "format": "native"}, tmp_path / "out", evaluated=False
    )
    (command,) = penjing.serve(tmp_path / "out").commands
    assert "import penjing" in command.command


def test_onnx_has_no_server(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").touch()
    with pytest.raises(EngineError, match="no server of its own; export it as gguf"):
        penjing.serve(tmp_path)
