"""Which engine takes which files, and what is said when one is missing or cannot."""

from collections.abc import Callable
from pathlib import Path

import pytest

from penjing.engines import ENGINES, engine_for, engine_named, model_path
from penjing.errors import CheckpointError, EngineError, MissingDependency
from penjing.formats import FORMATS

BuildTiny = Callable[..., Path]


def test_names_are_keys_and_formats_exist_or_are_coming() -> None:
    assert all(engine.name == name for name, engine in ENGINES.items())
    assert set(FORMATS) <= set().union(*(engine.formats for engine in ENGINES.values()))


@pytest.mark.parametrize("name", ENGINES)
def test_a_missing_engine_says_how_to_install_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(ENGINES[name]), "version", lambda self: None)
    with pytest.raises(MissingDependency, match="is not installed: ") as caught:
        engine_named(name)
    assert ENGINES[name].install in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_engine_gets_a_suggestion() -> None:
    with pytest.raises(EngineError, match="did you mean 'llamacpp'"):
        engine_named("lamacpp")


def test_files_choose_the_engine(tiny_model: BuildTiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for engine in ENGINES.values():
        monkeypatch.setattr(type(engine), "version", lambda self: "1")
    (tmp_path / "model.onnx").touch()
    assert engine_for(tiny_model("llama")).name == "transformers"
    assert engine_for(Path("some.gguf")).name == "llamacpp"
    assert engine_for(tmp_path).name == "onnxruntime"


@pytest.mark.parametrize("name", ["llamacpp", "llama-server", "onnxruntime"])
def test_an_engine_refuses_files_of_others(name: str, tiny_model: BuildTiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(ENGINES[name]), "version", lambda self: "1")
    with pytest.raises(EngineError, match=r"penjing export .* --to (gguf|onnx)"):
        engine_for(tiny_model("llama"), name)


def test_vllm_refuses_the_native_format(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "config.json").write_text('{"model_type": "llama", "quantization_config": {"quant_method": "penjing"}}')
    assert "--to compressed-tensors" in (ENGINES["vllm"].refusal(tmp_path) or "")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert ENGINES["vllm"].refusal(tmp_path) is None


def test_an_onnx_file_of_two_gigabytes_is_refused_unread(tmp_path: Path) -> None:
    with (tmp_path / "model.onnx").open("wb") as file:
        file.truncate(2**31)
    assert "external data" in (ENGINES["onnxruntime"].refusal(tmp_path) or "")


def test_a_directory_stands_for_its_only_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").touch()
    assert model_path(tmp_path) == tmp_path / "a.gguf"
    (tmp_path / "b.gguf").touch()
    with pytest.raises(CheckpointError, match="2 GGUF files"):
        model_path(tmp_path)


def test_nothing_there() -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        model_path("./nowhere")
