"""Recipes with a step that makes another model: what is planned, what is walked, what is not done twice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from penjing import api
from penjing.checkpoint import open_checkpoint, write_bytes
from penjing.errors import PlanError
from penjing.methods.base import Method, Options, Remake
from penjing.methods.quantization import table
from penjing.pipeline import stages
from penjing.pipeline.stages import RemakeTask
from runs import compress, recipe, texts

WANDA = {"method": "wanda", "sparsity": 0.5}
GPTQ = {"method": "gptq", "group_size": 32}


class Doubling(Remake):
    """Makes every weight of the blocks twice as large."""


class DoublingOptions(Options):
    """May keep zeros, may be impossible."""

    sparse: bool = True
    possible: bool = True


def config(before: Mapping[str, Any], layout: object, options: DoublingOptions) -> Mapping[str, Any]:
    if not options.possible:
        raise ValueError("it cannot be doubled")
    return {**before, "doubled": before.get("doubled", 0) + 1}


@pytest.fixture
def calls(monkeypatch) -> list[RemakeTask]:
    made: list[RemakeTask] = []

    def make(task: RemakeTask) -> Mapping[str, Any]:
        made.append(task)
        tensors = {name: task.source.load(name) for name in task.source.specs()}
        doubled = {name: tensor * 2 if ".layers." in name else tensor for name, tensor in tensors.items()}
        save_file(doubled, task.directory / "model.safetensors", metadata={"format": "pt"})
        for name, content in task.source.files():
            write_bytes(task.directory / name, content)
        write_bytes(task.directory / "config.json", json.dumps(dict(task.config)).encode())
        return {"seen": len(task.tokens)}

    remake = Doubling(config=config, keeps_zeros=lambda options: options.sparse)
    doubling = Method("doubling", "twice as large", "none", DoublingOptions, remake=remake)
    monkeypatch.setattr(table, "TABLE", (*table.TABLE, doubling))
    monkeypatch.setitem(stages.MAKERS, Doubling, make)
    return made


@pytest.fixture
def short(tmp_path: Path) -> dict[str, Any]:
    return texts(tmp_path / "texts")


def weights(directory: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(directory)
    return {name: checkpoint.load(name) for name in checkpoint.specs()}


def test_the_next_walk_starts_from_what_was_made(tiny_model, short, tmp_path, calls) -> None:
    model = tiny_model("llama")
    wanted = recipe(short, {"method": "doubling"}, {"method": "doubling"}, format="dense")
    report = compress(model, wanted, tmp_path / "out", evaluated=False)
    before, after = weights(model), weights(tmp_path / "out")
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name] * 4 if ".layers." in name else before[name])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["doubled"] == 2
    assert [entry["step"]["method"] for entry in report.made] == ["doubling", "doubling"]
    assert report.made[0]["seen"] == len(calls[0].tokens)
    assert calls[1].original.path == model, "the teacher is the model the recipe started from"
    assert not list((tmp_path / "out").rglob("stage-*"))
    compress(model, recipe(short, {"method": "magnitude", "sparsity": 0.5}, format="dense"), tmp_path / "one")
    others = ("report.json", "report.html", "README.md", "recipe.yaml")
    one, two = ({path.name for path in (tmp_path / name).iterdir()} - {*others} for name in ("one", "out"))
    assert two == one, "nothing of the work in between is left among the model's files"


def test_zeros_outlive_a_stage_that_keeps_them(tiny_model, short, tmp_path, calls) -> None:
    model = tiny_model("llama")
    kept = compress(model, recipe(short, WANDA, {"method": "doubling"}, GPTQ, format="native"), tmp_path / "kept")
    assert calls[0].zeros.keys() == {row.name for row in kept.modules if row.kind == "linear"}
    assert all(row.scheme.startswith("50% sparse, W4") for row in kept.modules if row.kind == "linear")
    zeros = [(tensor == 0).float().mean() for name, tensor in dense_linears(tmp_path / "kept").items()]
    assert min(zeros) >= 0.5
    steps = (WANDA, {"method": "doubling", "sparse": False}, GPTQ)
    lost = compress(model, recipe(short, *steps, format="native"), tmp_path / "lost", evaluated=False)
    assert all(row.scheme.startswith("W4") for row in lost.modules if row.kind == "linear")


def dense_linears(directory: Path) -> dict[str, torch.Tensor]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory)
    return {name: value for name, value in model.state_dict().items() if name.endswith("_proj.weight")}


def test_what_is_made_is_not_made_again(tiny_model, short, tmp_path, calls, monkeypatch) -> None:
    model = tiny_model("llama")
    wanted = recipe(short, WANDA, {"method": "doubling"}, GPTQ)
    compress(model, wanted, tmp_path / "whole", evaluated=False)
    calls.clear()
    real = stages.Walk.run

    def die(walk: stages.Walk) -> Any:
        if walk.directory == tmp_path / "out":
            raise KeyboardInterrupt
        return real(walk)

    monkeypatch.setattr(stages.Walk, "run", die)
    with pytest.raises(KeyboardInterrupt):
        compress(model, wanted, tmp_path / "out", evaluated=False)
    assert len(calls) == 1
    monkeypatch.setattr(stages.Walk, "run", lambda walk: real(walk))
    compress(model, wanted, tmp_path / "out", evaluated=False)
    assert len(calls) == 1
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        again = load_file(tmp_path / "out" / shard.name)
        assert all(torch.equal(tensor, again[name]) for name, tensor in load_file(shard).items())


def test_blocks_are_removed_before_a_model_is_made(tiny_model, short, tmp_path, calls) -> None:
    model = tiny_model("llama", layers=4)
    steps = ({"method": "shortgpt", "drop": 2}, {"method": "doubling"}, GPTQ)
    planned = api.plan(model, recipe(short, *steps))
    assert planned.layout.blocks == 2
    report = compress(model, recipe(short, *steps), tmp_path / "out")
    assert len(report.skipped) == 2
    assert calls[0].layout.blocks == 2
    assert report.predicted_bytes == sum(row.bytes for row in report.modules)
    assert report.source.parameters == sum(tensor.numel() for tensor in weights(model).values())


@pytest.mark.parametrize(
    ("steps", "said"),
    [
        ((GPTQ, {"method": "doubling"}), r"W4 g32 symmetric; quantise after it"),
        (({"method": "doubling", "possible": False},), r"doubling: it cannot be doubled"),
        ((WANDA, {"method": "doubling"}, {"method": "shortgpt", "drop": 1}), r"remove them before pruning"),
        (({"method": "doubling"}, GPTQ, GPTQ), r"step 3 \(gptq\) on .*: an earlier step already quantised it"),
    ],
)
def test_what_cannot_follow(tiny_model, short, calls, steps, said) -> None:
    with pytest.raises(PlanError, match=said):
        api.plan(tiny_model("llama"), recipe(short, *steps))
