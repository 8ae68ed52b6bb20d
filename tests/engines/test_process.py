"""An engine in a process of its own: what comes back, and what is said when it dies or its files are damaged."""

import importlib.util
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import penjing
from penjing.engines import EngineProcess, LoadRequest, Sampling
from penjing.engines.bench import Load, Spread, bench, read_bandwidth
from penjing.errors import EngineError, MissingDependency, PenjingError

pytest.importorskip("onnxruntime")
pytest.importorskip("onnx")


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_engines import write_onnx

    folder = tmp_path_factory.mktemp("onnx")
    write_onnx(folder / "model.onnx")
    return folder


@pytest.fixture
def running(graph: Path) -> Iterator[EngineProcess]:
    with EngineProcess("onnxruntime", LoadRequest(graph)) as process:
        yield process


def test_the_same_as_in_this_process(running: EngineProcess, graph: Path) -> None:
    from penjing.engines import ENGINES

    tokens = np.arange(12).reshape(2, 6)
    inside = ENGINES["onnxruntime"].load(LoadRequest(graph))
    np.testing.assert_array_equal(running.logits(tokens), inside.logits(tokens))
    assert list(running.generate([1, 2], Sampling(tokens=5))) == list(inside.generate([1, 2], Sampling(tokens=5)))
    assert running.vocabulary == inside.vocabulary
    memory = running.memory()
    assert 0 < memory["above_libraries"] < memory["peak"]


def test_the_engine_is_measured_without_torch(running: EngineProcess) -> None:
    """Or every engine would be charged with some 200 MB that it does not need."""
    maps = Path(f"/proc/{running._process.pid}/maps")
    if not maps.exists():
        pytest.skip("no /proc here")
    assert "libtorch" not in maps.read_text()


def test_a_crash_is_an_error_that_says_how(running: EngineProcess) -> None:
    os.kill(running._process.pid, signal.SIGSEGV)
    with pytest.raises(EngineError, match=r"onnxruntime died on .* \(SIGSEGV\)"):
        running.logits(np.zeros((1, 2), dtype=np.int64))


def test_a_crash_of_llamacpp_says_how_to_build_around_it(graph: Path) -> None:
    with EngineProcess("onnxruntime", LoadRequest(graph)) as process:
        process.engine = "llamacpp"
        os.kill(process._process.pid, signal.SIGILL)
        with pytest.raises(EngineError, match=r"SIGILL.*GGML_NATIVE=OFF.*GGML_AVX512=ON"):
            process.logits(np.zeros((1, 2), dtype=np.int64))


@pytest.mark.parametrize(
    ("engine", "name", "content", "said"),
    [
        ("onnxruntime", "model.onnx", b"not a graph", "ONNX Runtime cannot load it"),
        ("llamacpp", "model.gguf", b"not a model", "does not start with GGUF"),
        ("llamacpp", "model.gguf", b"GGUF\x03\x00\x00\x00" + b"\xff" * 40, "model.gguf"),
    ],
)
def test_damaged_files(engine: str, name: str, content: bytes, said: str, tmp_path: Path) -> None:
    pytest.importorskip({"llamacpp": "llama_cpp"}.get(engine, engine))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(PenjingError, match=said):
        EngineProcess(engine, LoadRequest(tmp_path / name))


def test_a_graph_without_a_cache_is_refused(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    value = helper.make_tensor_value_info
    node = helper.make_node("Cast", ["input_ids"], ["logits"], to=TensorProto.FLOAT)
    given, answer = value("input_ids", TensorProto.INT64, [1, None]), value("logits", TensorProto.FLOAT, [1, None])
    graph = helper.make_graph([node], "plain", [given], [answer])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), tmp_path / "m.onnx")
    with pytest.raises(EngineError, match="not a decoder with a key-value cache"):
        EngineProcess("onnxruntime", LoadRequest(tmp_path / "m.onnx"))


def test_bench(graph: Path, tiny_model: Callable[..., Path]) -> None:
    stages = []
    result = bench(
        [graph, tiny_model("llama")],
        ["onnxruntime"],
        load=Load(batches=(1, 2), lengths=(4,), steps=2, rounds=2),
        threads=1,
        progress=lambda stage, done, total, detail: stages.append((stage, done, total)),
    )
    (row,) = result.rows
    assert [(speed.batch, speed.length) for speed in row.speeds] == [(1, 4), (2, 4)]
    assert all(0 < spread.low <= spread.median <= spread.high for speed in row.speeds for spread in (speed.decode,))
    assert row.load_seconds > 0
    assert len(result.skipped) == 1
    assert "has none" in result.skipped[0]
    assert ("rounds", 3, 3) in stages
    assert row.read_per_token is None  # no config.json says whether the embedding is tied


def test_nothing_to_bench(tiny_model: Callable[..., Path]) -> None:
    with pytest.raises(EngineError, match="ONNX Runtime loads"):
        bench([tiny_model("llama")], ["onnxruntime"], progress=lambda *_: None)


def test_spread_and_bandwidth() -> None:
    assert Spread.of([3.0]) == Spread(3.0, 3.0, 3.0)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert read_bandwidth(1, size=2**20, repeats=2) > 1e6


@pytest.mark.skipif(importlib.util.find_spec("optimum") is not None, reason="optimum is installed")
def test_a_package_that_a_format_needs(tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    recipe = {"steps": [{"method": "rtn", "bits": 4, "group_size": 32}], "format": "gptq"}
    penjing.compress(tiny_model("llama"), recipe, tmp_path / "gptq", evaluated=False)
    with pytest.raises(MissingDependency, match="optimum"):
        EngineProcess("transformers", LoadRequest(tmp_path / "gptq"))
