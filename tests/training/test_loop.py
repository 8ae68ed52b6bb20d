"""The loop: the same curve after a kill, the same step however it is split, clear ends of runs that go astray."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import penjing
from penjing.errors import ResumeError, TrainingError
from penjing.methods.training import IGNORED, Loss, NextToken, Training, TrainOptions, next_token
from penjing.training import Pair, Pairs, Windows, loop, read_curve, train
from penjing.training.optimizers import share_of_rate
from tiny_models import token_windows

pytest.importorskip("accelerate")

OPTIONS = TrainOptions(steps=6, batch_size=4, micro_batch=2, learning_rate=1e-2, save_every=2)


class Killed(BaseException):
    """Stands in for the signal."""


@pytest.fixture(autouse=True)
def _same_arithmetic_everywhere(monkeypatch) -> Iterator[None]:
    from accelerate.state import AcceleratorState

    monkeypatch.setattr(loop, "compute_dtype", lambda device: torch.float32)
    AcceleratorState._reset_state(True)  # it holds what other tests of this process computed in
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="module")
def model(tiny_model) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model("llama"), attn_implementation="eager", attention_dropout=0.1)


def windows(options: TrainOptions = OPTIONS) -> Windows:
    return Windows(token_windows(10, 16), options.batch_size, options.micro_batch, options.seed)


def run(model: nn.Module, directory: Path, options: TrainOptions = OPTIONS, **keys: Any) -> tuple[Any, nn.Module]:
    student = copy.deepcopy(model).requires_grad_(True)
    keys = {"marks": {"model": "m"}, "batches": windows(options), **keys}
    batches = keys.pop("batches")
    return train(Training(student, NextToken()), batches, options, directory, **keys), student


def test_a_killed_run_goes_on_as_if_nothing_had_happened(model, tmp_path):
    whole, expected = run(model, tmp_path / "whole")

    def kill(stage: str, done: int, total: int, detail: str) -> None:
        if done in deaths:
            deaths.remove(done)
            raise Killed

    deaths = [1, 3, 4, 6]
    while deaths:
        with pytest.raises(Killed):
            run(model, tmp_path / "killed", progress=kill)
    curve, found = run(model, tmp_path / "killed", progress=kill)
    assert curve.losses == whole.losses and curve.steps == (1, 2, 3, 4, 5, 6)
    for name, value in expected.state_dict().items():
        assert torch.equal(value, found.state_dict()[name]), name


@pytest.mark.parametrize(
    ("keys", "options", "told"),
    [({"marks": {"model": "another"}}, {}, "another model"), ({}, {"learning_rate": 1e-3}, "another options")],
)
def test_a_changed_run_is_refused(model, tmp_path, keys, options, told):
    run(model, tmp_path)
    with pytest.raises(ResumeError, match=told):
        run(model, tmp_path, OPTIONS.model_copy(update=options), **keys)


def test_a_damaged_state_is_refused(model, tmp_path):
    run(model, tmp_path)
    path = tmp_path / "state.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ResumeError, match="damaged"):
        run(model, tmp_path)


def ragged(options: TrainOptions) -> Pairs:
    pairs = [Pair(row[: 5 + 3 * at], torch.arange(5 + 3 * at) > 2 + at) for at, row in enumerate(token_windows(4, 20))]
    return Pairs(pairs, 0, options.batch_size, options.micro_batch, options.seed)


@pytest.mark.parametrize("micro_batch", [1, 2])
def test_a_step_does_not_depend_on_how_it_is_split(model, tmp_path, micro_batch):
    """Micro-batches with different numbers of answers weigh what they hold."""
    keys = {"steps": 2, "clip": None, "micro_batch": 4}
    still = copy.deepcopy(model)
    still.config.attention_dropout = 0.0
    for layer in still.model.layers:
        layer.self_attn.attention_dropout = 0.0
    options = OPTIONS.model_copy(update=keys)
    split = options.model_copy(update={"micro_batch": micro_batch})
    whole, _ = run(still, tmp_path / "whole", options, batches=ragged(options))
    parts, _ = run(still, tmp_path / "split", split, batches=ragged(split))
    assert parts.losses == pytest.approx(whole.losses, rel=1e-5)
    assert json.loads((tmp_path / "split" / "train.jsonl").read_text().split("\n")[0])["count"] == 20


def test_moments_in_8_bits(model, tmp_path, monkeypatch):
    """They train like those of 32; moments that page need a GPU and say so."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    wanted, _ = run(model, tmp_path / "32", OPTIONS)
    curve, _ = run(model, tmp_path / "8", OPTIONS.model_copy(update={"optimizer": "adamw-8bit"}))
    assert curve.losses == pytest.approx(wanted.losses, rel=0.05) and curve.losses[-1] < curve.losses[0]
    with pytest.raises(TrainingError, match="no CUDA device"):
        run(model, tmp_path / "paged", OPTIONS.model_copy(update={"optimizer": "paged-adamw-8bit"}))


def test_it_is_the_loop_one_would_write(model, tmp_path):
    """AdamW, the schedule and clipping against a bare loop in PyTorch."""
    options = OPTIONS.model_copy(update={"micro_batch": 4, "weight_decay": 0.1, "clip": 0.5})
    still = copy.deepcopy(model)
    for layer in still.model.layers:
        layer.self_attn.attention_dropout = 0.0
    curve, _ = run(still, tmp_path, options)
    bare, losses = copy.deepcopy(still).requires_grad_(True), []
    matrices = [value for value in bare.parameters() if value.ndim > 1]
    vectors = [value for value in bare.parameters() if value.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    adam = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95))
    for step in range(options.steps):
        [batch] = windows(options)(step)
        loss = bare(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(bare.parameters(), 0.5)
        for group in adam.param_groups:
            group["lr"] = 1e-2 * share_of_rate(step, options.steps, options.warm_up)
        adam.step()
        adam.zero_grad()
        losses.append(loss.item())
    assert curve.losses == pytest.approx(losses, rel=1e-4)


def test_gradient_checkpointing_changes_nothing(model, tmp_path):
    kept, _ = run(model, tmp_path / "kept")
    twice, _ = run(model, tmp_path / "twice", OPTIONS.model_copy(update={"gradient_checkpointing": True}))
    assert twice.losses == pytest.approx(kept.losses, rel=1e-5)


class Strange(nn.Module):
    """A loss that goes wrong in one step."""

    def __init__(self, value: float, step: int) -> None:
        super().__init__()
        self.value, self.step, self.seen = value, step, 0

    def forward(self, model: nn.Module, batch: Any) -> Loss:
        self.seen += 1
        loss = next_token(model(input_ids=batch["input_ids"]).logits, batch)
        return Loss(loss + (self.value if self.seen >= self.step else 0.0))


def test_a_loss_that_is_no_number_ends_the_run_and_spares_the_weights(model, tmp_path):
    student = copy.deepcopy(model).requires_grad_(True)
    options = OPTIONS.model_copy(update={"micro_batch": 4})
    nothing = torch.full((), torch.nan, requires_grad=True)

    class Nan(Strange):
        def forward(self, model: nn.Module, batch: Any) -> Loss:
            loss = super().forward(model, batch)
            return Loss(loss.value * nothing if self.seen == 3 else loss.value)

    with pytest.raises(TrainingError, match="training step 3: loss, gradient_norm is not finite"):
        train(Training(student, Nan(0.0, 9)), windows(options), options, tmp_path, marks={})
    assert all(value.isfinite().all() for value in student.parameters())


def test_a_loss_that_runs_away_ends_the_run(model, tmp_path):
    student = copy.deepcopy(model).requires_grad_(True)
    options = TrainOptions(steps=60, batch_size=1, micro_batch=1, learning_rate=1e-5)
    with pytest.raises(TrainingError, match=r"training step \d+: the loss runs away"):
        train(Training(student, Strange(40.0, 30)), windows(options), options, tmp_path, marks={})


def test_nothing_to_train_is_an_error(model, tmp_path):
    frozen = copy.deepcopy(model).requires_grad_(False)
    with pytest.raises(TrainingError, match="nothing to train"):
        train(Training(frozen, NextToken()), windows(), OPTIONS, tmp_path, marks={})


def test_the_log_has_a_line_per_step(model, tmp_path):
    curve, _ = run(model, tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "train.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert {"loss", "rate", "gradient_norm", "count", "seconds"} <= rows[0].keys()
    assert read_curve(tmp_path / "train.jsonl") == curve and len(curve.losses) == 6


def test_ignored_labels_teach_nothing():
    logits = torch.randn(1, 4, 7)
    labels = torch.tensor([[1, IGNORED, 3, IGNORED]])
    expected = -logits[0, 1].log_softmax(-1)[3]
    assert next_token(logits, {"labels": labels}).item() == pytest.approx(expected.item())


@pytest.mark.slow
def test_two_processes_do_what_one_does(tiny_model, tmp_path):
    """Micro-batches are shared out, and gradients are those of the mean over all of them."""
    script = str(Path(__file__).with_name("two_devices.py"))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    found = []
    for name, start in {"one": [sys.executable], "two": launch}.items():
        command = [*start, script, str(tiny_model("llama")), str(tmp_path / name)]
        paths = os.pathsep.join([str(Path(__file__).parents[1]), str(Path(penjing.__file__).parents[1])])
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            env={**os.environ, "PYTHONPATH": paths, "ACCELERATE_USE_CPU": "true"},
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("[") == len(found) + 1, "every process tells its losses"
        found.append(read_curve(tmp_path / name / "train.jsonl").losses)
    assert found[1] == pytest.approx(found[0], rel=1e-5)
