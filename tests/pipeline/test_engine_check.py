"""`verify --engine`: an engine's logits beside Penjing's own, and what is said when they differ."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import penjing
from penjing.errors import CheckpointError, VerificationError
from penjing.pipeline import engine_check

BuildTiny = Callable[..., Path]


@pytest.fixture
def gguf(tiny_model: BuildTiny, tmp_path: Path) -> Path:
    pytest.importorskip("llama_cpp")
    from tiny_engines import write_gguf

    return write_gguf(tiny_model("qwen3"), tmp_path / "tiny.gguf")


def test_llamacpp_computes_what_the_file_holds(gguf: Path) -> None:
    result = penjing.verify(gguf, engine="llamacpp").as_dict()
    assert result["passed"]
    assert result["kl"] < 1e-3
    assert result["top1"] > 0.95
    assert result["positions"] == 2 * 127
    json.dumps(result)


def test_another_model_is_not_the_same(gguf: Path, tiny_model: BuildTiny) -> None:
    with pytest.raises(VerificationError, match=r"is not the model on disk: KL .* First others: position \d+ of"):
        penjing.verify(gguf, engine="llamacpp", against=tiny_model("qwen3", seed=3))


@pytest.mark.slow
def test_transformers_on_a_directory(tiny_model: BuildTiny, tmp_path: Path) -> None:
    result = penjing.verify(tiny_model("llama"), engine="transformers").as_dict()
    assert result["kl"] < 1e-8
    changed = tmp_path / "changed"
    changed.mkdir()
    for path in tiny_model("llama").iterdir():
        (changed / path.name).write_bytes(path.read_bytes())
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"] *= 0.5
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    with pytest.raises(VerificationError, match="is not the model on disk"):
        penjing.verify(changed, engine="transformers", against=tiny_model("llama"))


def test_onnx_needs_the_model_it_was_made_from(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    (tmp_path / "model.onnx").write_bytes(b"")
    with pytest.raises(CheckpointError, match="--against MODEL"):
        penjing.verify(tmp_path, engine="onnxruntime")


class Written:
    """An engine that gives no logits, only tokens."""

    def __init__(self, *tokens: int) -> None:
        self.tokens = tokens

    def generate(self, prompt: list[int], sampling: object) -> list[int]:
        return list(self.tokens)


def test_tokens_without_logits() -> None:
    tokens = engine_check._continued(Written(1, 0), torch.tensor([[3, 3, 3], [0, 0, 0]]))  # type: ignore[arg-type]
    assert tokens.tolist() == [[3, 3, 3, 1, 0]]
    expected = torch.zeros(1, 5, 4)
    expected[0, 2, 1], expected[0, 3, 2] = 5.0, 5.0  # the second token should have been 2
    result = engine_check._by_choices(("m", "llama-server", "1", "m"), tokens, expected, 3)
    assert (result.positions, result.top1, result.kl) == (2, 0.5, None)
    assert [(each.expected, each.found) for each in result.differences] == [(2, 0)]
    with pytest.raises(VerificationError, match="writes other tokens"):
        engine_check._require(result)
