"""Verification notices whatever happens to a written model, and says what."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from penjing.errors import CheckpointError, PenjingError, VerificationError
from penjing.pipeline import verification
from penjing.pipeline.journal import FOLDER, digest
from penjing.pipeline.verification import TOLERANCE, fits_in_memory, verify
from runs import compress, recipe, texts

SHARD = "model-00002-of-00004.safetensors"
PROBE = f"{FOLDER}/probe.safetensors"


@pytest.fixture(scope="module")
def original(tiny_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("verified")
    wanted = recipe(texts(folder / "texts"), {"method": "rtn", "group_size": 32}, format="native")
    compress(tiny_model("llama"), wanted, folder / "out", evaluated=False)
    return folder / "out"


@pytest.fixture
def written(original, tmp_path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "out"))


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def rewrite(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def index(directory: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = directory / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content["weight_map"])
    path.write_text(json.dumps(content))


def renew(directory: Path, answer: dict[str, torch.Tensor]) -> None:
    """The model is said to have given `answer`, and the files to be those that lie there."""
    with safe_open(directory / PROBE, "pt") as file:
        digests = json.loads(file.metadata()["sha256"])
    renewed = {name: digest(directory / name) for name in digests}
    (directory / PROBE).write_bytes(save(answer, {"sha256": json.dumps(renewed)}))


def add(directory: Path) -> None:
    rewrite(directory / SHARD, lambda tensors: tensors.update(extra=torch.ones(2)))
    index(directory, lambda weight_map: weight_map.update(extra=SHARD))


def remove(directory: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight_scale"
    rewrite(directory / SHARD, lambda tensors: tensors.pop(name))
    index(directory, lambda weight_map: weight_map.pop(name))


def tamper(directory: Path) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"rms_norm_eps": 0.1}))


def scale(directory: Path) -> None:
    rewrite(directory / SHARD, lambda tensors: tensors["model.layers.0.self_attn.q_proj.weight_scale"].mul_(1.5))


HARM: dict[str, Callable[[Path], object]] = {
    "last bit": lambda directory: flip(directory / SHARD, -1),
    "a bit in the middle": lambda directory: flip(directory / SHARD, 5000),
    "a bit of the header": lambda directory: flip(directory / SHARD, 40),
    "tensor added": add,
    "tensor removed": remove,
    "scale changed": scale,
    "config": tamper,
    "shard gone": lambda directory: (directory / SHARD).unlink(),
    "shard added": lambda directory: shutil.copy(directory / SHARD, directory / "more.safetensors"),
}


def test_what_was_written_passes(written: Path) -> None:
    assert verify(written, engine=False).difference == 0


@pytest.mark.parametrize("name", HARM)
def test_harm_is_noticed(name: str, written: Path) -> None:
    HARM[name](written)
    with pytest.raises(VerificationError, match=r"changed after it was written|is missing|did not write"):
        verify(written, engine=False)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("tensor added", r"that no module reads: extra"),
        ("tensor removed", r"there is no tensor .*q_proj.weight_scale"),
        ("scale changed", r"logits differ"),
        ("config", r"logits differ"),
    ],
)
def test_harm_done_before_the_digests_is_noticed_by_reading(name: str, words: str, written: Path) -> None:
    """A writer that goes wrong leaves digests of wrong files: then the tensors and the logits tell."""
    HARM[name](written)
    renew(written, load_file(written / PROBE))
    with pytest.raises(PenjingError, match=words):
        verify(written, engine=False)


def test_a_model_that_makes_much_of_little_may_differ_by_as_much(written: Path) -> None:
    """Sharp attention turns the last bit of a sum into digits of the logits, which no reader can reproduce."""

    def sharpen(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if name.endswith("q_proj.weight_scale"):
                tensor.mul_(100)

    for shard in written.glob("model-*.safetensors"):
        rewrite(shard, sharpen)
    tokens = load_file(written / PROBE)["tokens"].clone()  # the file is written anew below
    _, logits = verification._streamed(written, tokens, False)
    noise = verification._own_noise(written, tokens, logits, False)
    assert noise > 2 * TOLERANCE
    renew(written, {"tokens": tokens, "logits": logits + noise / 2 * logits.abs().max()})
    result = verify(written, engine=False)
    assert result.difference == pytest.approx(noise / 2, rel=0.01)
    assert result.tolerance == pytest.approx(noise)
    renew(written, {"tokens": tokens, "logits": logits + 2 * noise * logits.abs().max()})
    with pytest.raises(VerificationError, match="logits differ"):
        verify(written, engine=False)


@pytest.mark.slow
def test_a_directory_that_transformers_cannot_load(written: Path, monkeypatch) -> None:
    monkeypatch.setattr(verification, "_check_files", lambda directory, probe: None)
    config = json.loads((written / "config.json").read_text())
    del config["quantization_config"]
    (written / "config.json").write_text(json.dumps(config))
    with pytest.raises(VerificationError, match="transformers"):
        verification._through_transformers(written, written / PROBE, False)


def test_a_directory_of_others(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not written by penjing"):
        verify(tmp_path, engine=False)


def test_a_model_larger_than_memory_is_not_loaded() -> None:
    assert fits_in_memory(1000)
    assert not fits_in_memory(10**15)
