"""Training the finished model: the loss falls, codes stay, a kill leaves the old model or the new one."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from penjing import api
from penjing.errors import PlanError
from penjing.methods.base import Tuned
from penjing.methods.quantization import e2e_qp
from penjing.pipeline import journal, tune
from penjing.pipeline.stream import StreamedModel
from runs import Killed, compress, recipe, shards, texts

GPTQ = {"method": "gptq", "bits": 2, "group_size": 16}
TRAIN = {"method": "e2e-qp", "iterations": 12, "batch_size": 2, "learning_rate": 1e-2}


@pytest.fixture
def short(tmp_path: Path) -> dict[str, Any]:
    return texts(tmp_path / "texts")


def tensors(directory: Path) -> dict[str, torch.Tensor]:
    return {name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "mixtral"])
def test_the_loss_falls_and_codes_stay(tiny_model: Callable[..., Path], short, tmp_path, family):
    model, losses = tiny_model(family), []

    def hear(stage: str, done: int, total: int, detail: str) -> None:
        if stage == "e2e-qp":
            losses.append(float(detail.removeprefix("loss ")))

    rounded = compress(model, recipe(short, GPTQ, format="native"), tmp_path / "rounded")
    trained = compress(model, recipe(short, GPTQ, TRAIN, format="native"), tmp_path / "trained", progress=hear)
    assert len(losses) == 12 and sum(losses[-4:]) < sum(losses[:4])
    before, after = tensors(tmp_path / "rounded"), tensors(tmp_path / "trained")
    assert before.keys() == after.keys() and trained.bytes == rounded.bytes
    assert all(torch.equal(before[name], after[name]) for name in before if name.endswith("weight_codes"))
    assert any(not torch.equal(before[name], after[name]) for name in before if name.endswith("weight_scale"))


def test_norms_are_trained_as_what_they_multiply_by(tiny_model, short, tmp_path, monkeypatch):
    """In Gemma that is one more than what is stored: half of it, and of nothing else, is written."""

    def halve(task: Any, options: Any, report: Any) -> Tuned:
        norms = {name: value.requires_grad_() for name, value in task.norms.items()}
        linears = {name: weight.dense().requires_grad_() for name, weight in task.weights.items()}
        assert task.loss([0], norms.get) == pytest.approx(task.loss([0], linears.get))
        return Tuned({}, {name: value.detach() / 2 for name, value in norms.items()})

    monkeypatch.setattr(e2e_qp, "e2e_qp", halve)
    compress(tiny_model("gemma3"), recipe(short, GPTQ), tmp_path / "rounded")
    compress(tiny_model("gemma3"), recipe(short, GPTQ, TRAIN), tmp_path / "halved", evaluated=False)
    before, after = tensors(tmp_path / "rounded"), tensors(tmp_path / "halved")
    inside = [name for name in before if "layers." in name and "norm" in name]
    assert inside and not any(name.endswith("bias") for name in inside)
    for name, value in before.items():
        expected = (value.float() + 1) / 2 - 1 if name in inside else value.float()
        torch.testing.assert_close(after[name].float(), expected, rtol=0, atol=1e-2 if name in inside else 0)


@pytest.mark.parametrize("before", [(), ({"method": "rotation"},), ({"method": "shortgpt", "drop": 1},)], ids=str)
def test_the_aim_is_the_dense_model_whoever_ran_it(before, tiny_model, short, tmp_path, monkeypatch):
    """A walk that keeps the dense model's states hands them on, if they are those of the model before any change."""
    seen, ran, init, forward = [], [], tune.FinishedModel.__init__, StreamedModel.forward

    def spy(self: Any, plan: Any, config: Any, teacher: Any, folder: Any, kept: Any, tokens: Any, targets: Any) -> None:
        seen.append((targets, forward(teacher, tokens, targets.dtype)))
        init(self, plan, config, teacher, folder, kept, tokens, targets)

    monkeypatch.setattr(StreamedModel, "forward", lambda *args: ran.append(args) or forward(*args))
    monkeypatch.setattr(tune.FinishedModel, "__init__", lambda *args, trust_remote_code: spy(*args))
    steps = (*before, {**GPTQ, "asymmetric": True}, TRAIN)
    compress(tiny_model("llama"), recipe(short, *steps), tmp_path / "out", evaluated=False)
    [(targets, expected)] = seen
    assert torch.equal(targets, expected)
    assert len(ran) == (1 if before else 0)


def test_a_stranger_loads_the_trained_model(tiny_model, short, tmp_path):
    steps = ({"method": "shortgpt", "drop": 1}, {"method": "wanda", "sparsity": 0.25}, GPTQ, TRAIN)
    report = compress(tiny_model("llama"), recipe(short, *steps), tmp_path / "out", engine=True)
    assert report.verification["how"] == "transformers"
    assert api.verify(tmp_path / "out").positions > 0


@pytest.mark.parametrize(
    "moment", ["before a new shard", "after a new shard", "before the journal", "after the journal"]
)
def test_killed_while_shards_are_replaced(tiny_model, short, tmp_path, monkeypatch, moment):
    model, wanted = tiny_model("llama"), recipe(short, GPTQ, TRAIN)
    compress(model, wanted, tmp_path / "whole")
    with monkeypatch.context() as patch:
        _kill(patch, moment)
        with pytest.raises(Killed):
            compress(model, wanted, tmp_path / "killed")
    compress(model, wanted, tmp_path / "killed")
    assert shards(tmp_path / "killed") == shards(tmp_path / "whole")
    assert not list((tmp_path / "killed" / journal.FOLDER).glob("model-*"))


def _kill(patch: pytest.MonkeyPatch, moment: str) -> None:
    write, place = journal.write_shard, journal.Journal._put_in_place

    def writing(path: Path, given: Any) -> None:
        if moment == "after a new shard":
            write(path, given)
        if "new shard" in moment:
            raise Killed
        write(path, given)

    def saving(self: journal.Journal) -> None:
        raise Killed

    def placing(self: journal.Journal) -> None:
        if self._pending and moment == "after the journal":
            first = self._pending[0]
            (self.directory / journal.FOLDER / first).replace(self.directory / first)
            raise Killed
        place(self)

    patch.setattr(journal, "write_shard", writing)
    patch.setattr(journal.Journal, "_put_in_place", placing)
    if moment == "before the journal":
        replace = journal.Journal.replace

        def replacing(self: journal.Journal, *arguments: Any) -> None:
            patch.setattr(journal.Journal, "save", saving)
            replace(self, *arguments)

        patch.setattr(journal.Journal, "replace", replacing)


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ((TRAIN,), "after the"),
        (({**GPTQ, "bits": 8, "group_size": "channel", "activations": {"bits": 8}}, TRAIN), "without `activations`"),
        (({**GPTQ, "targets": ["*.mlp.*"]}, {**TRAIN, "targets": ["linear"]}), "target only"),
        ((GPTQ, TRAIN, {"method": "magnitude", "sparsity": 0.5}), "move that step to the end"),
    ],
)
def test_what_cannot_be_trained_is_refused_before_the_work(tiny_model, short, tmp_path, steps, reason):
    with pytest.raises(PlanError, match=reason):
        compress(tiny_model("llama"), recipe(short, *steps, format="native"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
