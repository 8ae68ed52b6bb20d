"""PEQA: text grows likelier, codes stay, and a task is a small file that turns one model into the other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from penjing import cli
from penjing.errors import CheckpointError
from penjing.training.task_scales import apply_task, save_task
from runs import compress, recipe, texts

GPTQ = {"method": "gptq", "bits": 3, "group_size": 32}
PEQA = {"method": "peqa", "iterations": 12, "batch_size": 2, "learning_rate": 1e-2}


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_task_is_scales_alone(family, tiny_model, tmp_path):
    short, losses = texts(tmp_path / "texts"), []

    def hear(stage: str, done: int, total: int, detail: str) -> None:
        if stage == "peqa":
            losses.append(float(detail.split()[-1]))

    model = tiny_model(family)
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    compress(model, recipe(short, GPTQ, format="native"), base, evaluated=False)
    compress(model, recipe(short, GPTQ, PEQA, format="native"), tuned, evaluated=False, progress=hear)
    assert sum(losses[-4:]) < sum(losses[:4])
    before, after = tensors(base), tensors(tuned)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed and all(name.endswith("weight_scale") for name in changed)
    size = save_task(base, tuned, tmp_path / "task.safetensors")
    assert 0 < size < 0.2 * sum(value.nbytes for value in before.values())
    back = save_task(tuned, base, tmp_path / "back.safetensors")
    assert back == size
    for task, expected in (("task", after), ("back", before)):
        apply_task(base, tmp_path / f"{task}.safetensors")
        assert all(torch.equal(value, expected[name]) for name, value in tensors(base).items())


def test_verbs(tmp_path, capsys):
    for name, factor in (("base", 1.0), ("taught", 2.0)):
        (tmp_path / name).mkdir()
        values = {"a.weight_codes": torch.arange(4), "a.weight_scale": factor * torch.ones(2)}
        save_file(values, tmp_path / name / "model.safetensors")
    base, taught, file = (str(tmp_path / name) for name in ("base", "taught", "task.safetensors"))
    assert cli.main(["task", "save", base, taught, "-o", file, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["bytes"] == 8
    assert cli.main(["task", "apply", base, file]) == 0
    expected = tensors(tmp_path / "taught")
    assert all(torch.equal(value, expected[name]) for name, value in tensors(tmp_path / "base").items())
    assert cli.main(["task", "save", base, str(tmp_path / "none"), "-o", file]) == 2


def test_what_is_no_task(tiny_model, tmp_path):
    model, other = tmp_path / "model", tmp_path / "other"
    for directory in (model, other):
        directory.mkdir()
    values = {"a.weight_codes": torch.arange(4), "a.weight_scale": torch.ones(2)}
    save_file(values, model / "model.safetensors")
    save_file({**values, "a.weight_codes": torch.arange(4) + 1}, other / "model.safetensors")
    with pytest.raises(CheckpointError, match="other codes"):
        save_task(model, other, tmp_path / "task.safetensors")
    save_file({"b": torch.ones(1)}, other / "model.safetensors")
    with pytest.raises(CheckpointError, match="only one of them"):
        save_task(model, other, tmp_path / "task.safetensors")
    with pytest.raises(CheckpointError, match="not a task"):
        apply_task(model, other / "model.safetensors")
    (other / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes()[:-1])
    for damaged in (lambda: apply_task(model, other / "model.safetensors"), lambda: save_task(model, other, model)):
        with pytest.raises(CheckpointError, match=r"model\.safetensors: .*download it again"):
            damaged()
    shutil.rmtree(other)
    with pytest.raises(CheckpointError, match="no safetensors"):
        save_task(model, other, tmp_path / "task.safetensors")
