"""Export: the same codes in another format, refusals before anything is written, nothing quantised anew."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import penjing
from penjing.errors import MissingDependency, OutputError, PlanError, VerificationError
from penjing.formats import FORMATS
from penjing.pipeline import export as exporting

BuildTiny = Callable[..., Path]
W4 = {"method": "rtn", "bits": 4, "group_size": 32}


@pytest.fixture
def compressed(tiny_model: BuildTiny, tmp_path: Path) -> Callable[..., Path]:
    def make(step: dict[str, Any], family: str = "llama", format: str = "native") -> Path:
        output = tmp_path / f"{family}-{format}"
        recipe = {"steps": [step], "format": format, "calibration": {"samples": 2, "length": 32}}
        penjing.compress(tiny_model(family), recipe, output, evaluated=False)
        return output

    return make


def shards(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.glob("*.safetensors"))}


@pytest.mark.parametrize(
    "step",
    [
        W4,
        {"method": "rtn", "bits": 8, "group_size": -1, "activations": {"bits": 8, "dynamic": False}},
    ],
    ids=["W4", "W8A8 static"],
)
def test_there_and_back_gives_the_same_bytes(
    step: dict[str, Any], compressed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "fits_in_memory", lambda parameters: False)  # loading it is tested elsewhere
    native = compressed(step)
    there = penjing.export(native, "compressed-tensors", tmp_path / "there")
    back = penjing.export(tmp_path / "there", "native", tmp_path / "back")
    assert shards(tmp_path / "back") == shards(native)
    assert (there.source, there.format, back.format) == ("native", "compressed-tensors", "native")
    assert there.difference < 1e-2
    assert there.bytes == sum(path.stat().st_size for path in (tmp_path / "there").glob("*.safetensors"))


def test_the_result_verifies_and_is_whole(compressed: Callable[..., Path], tmp_path: Path) -> None:
    native = compressed(W4, "gpt2")
    penjing.export(native, "dense", tmp_path / "dense")
    assert penjing.verify(tmp_path / "dense").how == "transformers"  # type: ignore[union-attr]
    assert (tmp_path / "dense" / "tokenizer.json").read_bytes() == (native / "tokenizer.json").read_bytes()
    assert not (tmp_path / "dense" / "report.json").exists()
    path = next((tmp_path / "dense").glob("model-00002-*"))
    weight = load_file(path)["transformer.h.0.attn.c_attn.weight"]
    assert len(weight.unique()) > 16  # decoded, in the checkpoint's orientation
    assert weight.shape == (64, 192)


def test_a_dense_model_becomes_another_dense_model(tiny_model: BuildTiny, tmp_path: Path) -> None:
    done = penjing.export(tiny_model("gemma2"), "native", tmp_path / "out")
    assert done.difference == 0


def test_plain_tensors_may_be_stored_in_fewer_bits(tiny_model: BuildTiny, tmp_path: Path) -> None:
    wide = shutil.copytree(tiny_model("llama", calm=True), tmp_path / "wide")
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    done = penjing.export(wide, "dense", tmp_path / "narrow")
    assert done.difference < 1e-4
    assert all(
        t.dtype == torch.bfloat16
        for file in (tmp_path / "narrow").glob("*.safetensors")
        for t in load_file(file).values()
    )


def test_one_file_for_llamacpp(compressed: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    native = compressed({"method": "rtn", "type": "q8_0"})
    done = penjing.export(native, "gguf", tmp_path / "out")
    assert [path.suffix for path in (tmp_path / "out").iterdir() if path.is_file()] == [".gguf"]
    assert done.difference < 1e-4


def test_a_graph_for_onnxruntime(compressed: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnx")
    done = penjing.export(compressed(W4), "onnx", tmp_path / "out")
    assert done.verified == "onnxruntime"
    assert (tmp_path / "out" / "model.onnx").is_file()


def test_what_does_not_fit_is_refused_with_what_does(compressed: Callable[..., Path], tmp_path: Path) -> None:
    native = compressed(W4)
    with pytest.raises(PlanError, match=r"format bitsandbytes cannot hold .*Formats that can: .*native") as caught:
        penjing.export(native, "bitsandbytes", tmp_path / "out")
    assert "and 11 more" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_library_that_is_missing_does_not_hide_the_reason(
    compressed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(self: Any, *arguments: Any) -> list[str]:
        raise MissingDependency("not here")

    native = compressed({"method": "rtn", "bits": 5, "group_size": 32})
    monkeypatch.setattr(type(FORMATS["bitsandbytes"]), "problems", missing)
    with pytest.raises(PlanError, match=r"format awq cannot hold .*Formats that can: .*native"):
        penjing.export(native, "awq", tmp_path / "out")


def test_bad_names_and_used_directories(tiny_model: BuildTiny, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="did you mean 'native'"):
        penjing.export(tiny_model("llama"), "nativ", tmp_path / "out")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "file").touch()
    with pytest.raises(OutputError, match="not an unfinished run"):
        penjing.export(tiny_model("llama"), "dense", tmp_path / "used")


def test_a_format_that_changes_a_code_is_found_out(
    compressed: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    native = compressed(W4)
    target = type(FORMATS["compressed-tensors"])
    honest = target.pack

    def pack(self: Any, *arguments: Any) -> dict[str, torch.Tensor]:
        packed = honest(self, *arguments)
        name = next(name for name in packed if name.endswith("weight_packed"))
        packed[name] = packed[name] ^ 1
        return packed

    monkeypatch.setattr(target, "pack", pack)
    with pytest.raises(VerificationError, match="does not unpack to what was packed"):
        penjing.export(native, "compressed-tensors", tmp_path / "out")
