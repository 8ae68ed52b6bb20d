"""A recipe step that trains: a stock directory in, a stock directory out, zeros where they were."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from penjing.checkpoint import open_checkpoint
from penjing.errors import CalibrationError, CheckpointError
from penjing.methods.adaptation.recover import RecoverOptions, train
from penjing.training.models import load_model, save_model, zeros_of
from penjing.training.stage import TrainStage
from tiny_models import FAMILIES, token_windows

pytest.importorskip("accelerate")

SHORT = {"steps": 4, "batch_size": 2, "micro_batch": 2, "rank": 4, "save_every": 2}


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


def pruned(model: Path, directory: Path) -> Path:
    """A copy of a tiny model without the smaller half of every matrix in its blocks."""
    checkpoint = open_checkpoint(model)
    loaded = load_model(checkpoint)
    for name, value in loaded.named_parameters():
        if value.ndim >= 2 and "embed" not in name and "head" not in name and "wte" not in name and "wpe" not in name:
            value.mul_(value.abs() > value.abs().median())
    save_model(loaded, checkpoint, directory, torch.float32)
    return directory


def stage(source: Path, original: Path) -> TrainStage:
    student = open_checkpoint(source)
    return TrainStage(student, open_checkpoint(original), token_windows(6, 24), student.config, torch.float32)


@pytest.mark.parametrize("what", ["lora", "full"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral"])
def test_recovery_brings_logits_back_and_zeros_stay(family, what, tiny_model, tmp_path):
    source = pruned(tiny_model(family), tmp_path / "pruned")
    options = RecoverOptions(**SHORT | {"steps": 12, "what": what, "learning_rate": 1e-3, "weight_decay": 0.1})
    curve = stage(source, tiny_model(family)).run("recover", train, options, tmp_path / "out", tmp_path / "work")
    assert sum(curve.losses[-3:]) < 0.95 * sum(curve.losses[:3])
    before, after = tensors(source), tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    for name, value in before.items():
        if value.ndim >= 2 and "embed" not in name and "wte" not in name and "wpe" not in name:
            assert torch.equal(value == 0, after[name] == 0), name
    assert any(not torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_written_is_what_was_read(family, tiny_model, tmp_path):
    """Loading and saving changes neither tensors nor names, for every family, tied or not."""
    for tied in (True, False):
        source = open_checkpoint(tiny_model(family, tied=tied))
        save_model(load_model(source), source, tmp_path / "out", torch.float32)
        before, after = tensors(source.path), tensors(tmp_path / "out")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["tie_word_embeddings"] is tied
        assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (source.path / "tokenizer.json").read_bytes()
        assert not list(tmp_path.glob(".*"))


def test_a_student_that_is_the_teacher_has_nothing_to_learn(tiny_model, tmp_path):
    source = tiny_model("llama")
    options = RecoverOptions(**SHORT)
    curve = stage(source, source).run("recover", train, options, tmp_path / "out", tmp_path / "work")
    assert max(abs(loss) for loss in curve.losses) < 1e-5


def test_another_teacher_and_the_text_itself(tiny_model, tmp_path):
    source, other = tiny_model("llama"), tiny_model("llama", seed=1)
    taught = RecoverOptions(**SHORT, teacher=str(other))
    curve = stage(source, source).run("recover", train, taught, tmp_path / "out", tmp_path / "work")
    assert curve.losses[0] > 0.5
    told = RecoverOptions(**SHORT, loss="next-token")
    curve = stage(source, source).run("recover", train, told, tmp_path / "text", tmp_path / "work2")
    assert curve.losses[0] > 3


def test_a_killed_stage_writes_the_same(tiny_model, tmp_path):
    source = pruned(tiny_model("llama"), tmp_path / "pruned")
    options = RecoverOptions(**SHORT)

    def kill(name: str, done: int, total: int, detail: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    one = stage(source, tiny_model("llama"))
    one.run("recover", train, options, tmp_path / "whole", tmp_path / "work")
    with pytest.raises(KeyboardInterrupt):
        one.run("recover", train, options, tmp_path / "killed", tmp_path / "work2", kill)
    assert not (tmp_path / "killed").exists()
    one.run("recover", train, options, tmp_path / "killed", tmp_path / "work2")
    whole, killed = tensors(tmp_path / "whole"), tensors(tmp_path / "killed")
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


def test_packed_codes_and_foreign_tensors_are_refused(tiny_model, tmp_path):
    source = open_checkpoint(tiny_model("llama"))
    config = {**source.config, "quantization_config": {"bits": 4}}
    save_model(load_model(source), source, tmp_path / "codes", torch.float32, config)
    with pytest.raises(CheckpointError, match="packed codes"):
        load_model(open_checkpoint(tmp_path / "codes"))
    save_model(load_model(source), source, tmp_path / "odd", torch.float32)
    found = tensors(tmp_path / "odd")
    found["model.layers.0.mlp.extra.weight"] = found.pop("model.norm.weight")
    save_file(found, tmp_path / "odd" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing_keys.*model\.norm\.weight"):
        load_model(open_checkpoint(tmp_path / "odd"))


def write_records(path: Path, records: list[dict[str, Any]]) -> str:
    path.write_text("\n".join(json.dumps(record) for record in records))
    return str(path)


def test_pairs_are_trained_on_their_answers(tiny_model, tmp_path):
    data = write_records(
        tmp_path / "pairs.jsonl", [{"prompt": f"Count to {n}", "response": "one " * n} for n in range(2, 6)]
    )
    source = tiny_model("llama")
    options = RecoverOptions(**SHORT, loss="next-token", data=data, length=64)
    curve = stage(source, source).run("recover", train, options, tmp_path / "out", tmp_path / "work")
    assert all(math.isfinite(loss) for loss in curve.losses)
    with pytest.raises(CalibrationError, match="no pair fits 4 tokens"):
        stage(source, source).batches(options.model_copy(update={"length": 4}))


def test_text_of_its_own(tiny_model, tmp_path):
    (tmp_path / "own.txt").write_text("A pine in a pot. " * 200)
    options = RecoverOptions(**SHORT, data=str(tmp_path / "own.txt"), length=16, samples=5)
    source = tiny_model("llama")
    batches, _ = stage(source, source).batches(options)
    assert batches(0)[0]["input_ids"].shape == (2, 16) and len(batches.tokens) == 5


def test_zeros_are_found_in_matrices_alone(tiny_model):
    model: nn.Module = load_model(open_checkpoint(tiny_model("llama")))
    assert zeros_of(model) == {}
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight")[3, 5] = 0
        model.get_parameter("model.embed_tokens.weight")[3] = 0
    [(name, kept)] = zeros_of(model).items()
    assert name == "model.layers.0.mlp.up_proj.weight" and int((~kept).sum()) == 1
