"""Pruning while training: exact counts, zeros that stay, levels that start from the same weights and data."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from penjing.checkpoint import open_checkpoint
from penjing.methods.adaptation.low_rank_change import matrices
from penjing.methods.pruning import gradual, lottery_ticket
from penjing.methods.pruning.gradual import GradualOptions, cubic
from penjing.methods.pruning.lottery_ticket import LotteryOptions
from penjing.methods.training import TrainTask
from penjing.training import Windows, train
from penjing.training.loop import Course
from penjing.training.models import load_model
from tiny_models import token_windows

pytest.importorskip("accelerate")

SHORT: dict[str, Any] = {"batch_size": 2, "micro_batch": 2, "loss": "next-token", "learning_rate": 1e-3}


@pytest.fixture
def model(tiny_model) -> nn.Module:
    return load_model(open_checkpoint(tiny_model("llama")))


def inside(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: module.get_parameter(own).detach() for name, module, own in matrices(model)}


def run(method: Any, model: nn.Module, options: Any, directory: Path, hear: Any = None) -> Any:
    training = method.train(TrainTask(model, lambda: model), options)
    batches = Windows(token_windows(6, 16), options.batch_size, options.micro_batch, options.seed)
    return train(training, batches, options, directory, marks={}, progress=hear or (lambda *_: None))


def test_the_cubic_schedule():
    assert cubic(5, 10, 0.0, 0.8) == pytest.approx(0.7)
    assert [cubic(step, 10, 0.2, 0.8) for step in (0, 10, 20)] == pytest.approx([0.2, 0.8, 0.8])


def test_gradual_pruning_counts_and_only_narrows(model, tmp_path):
    seen: list[dict[str, torch.Tensor]] = []
    options = GradualOptions(**SHORT, steps=8, every=2, until=0.75, sparsity=0.6, weight_decay=0.1)
    run(gradual, model, options, tmp_path, lambda *_: seen.append({k: v == 0 for k, v in inside(model).items()}))
    for earlier, later in itertools.pairwise(seen):
        assert all((earlier[name] <= later[name]).all() for name in later)
    for name, zeros in seen[-1].items():
        assert int(zeros.sum()) == int(zeros.numel() * 0.6 + 1e-6), name
        assert int(seen[1][name].sum()) == int(zeros.numel() * cubic(2, 6, 0, 0.6) + 1e-6)


@pytest.mark.parametrize("method", [gradual, lottery_ticket])
def test_a_killed_schedule_goes_on(method, tiny_model, tmp_path):
    if method is gradual:
        options: Any = GradualOptions(**SHORT, steps=6, every=2, save_every=1)
    else:
        options = LotteryOptions(**SHORT, steps=3, levels=2, rewind=1, save_every=1)

    def kill(stage: str, done: int, total: int, detail: str) -> None:
        if done in deaths:
            deaths.remove(done)
            raise KeyboardInterrupt

    whole, killed = (load_model(open_checkpoint(tiny_model("llama"))) for _ in range(2))
    curve, deaths = run(method, whole, options, tmp_path / "whole"), [2, 4, 5]
    while deaths:
        killed = load_model(open_checkpoint(tiny_model("llama")))
        with pytest.raises(KeyboardInterrupt):
            run(method, killed, options, tmp_path / "killed", kill)
    killed = load_model(open_checkpoint(tiny_model("llama")))
    assert run(method, killed, options, tmp_path / "killed").losses == curve.losses
    assert all(torch.equal(value, inside(killed)[name]) for name, value in inside(whole).items())


@pytest.mark.parametrize("control", ["none", "random-mask", "random-weights"])
def test_a_ticket_starts_again_from_the_same_weights(control, model, tmp_path):
    options = LotteryOptions(**SHORT, steps=3, levels=2, rewind=1, control=control)
    at: dict[int, dict[str, torch.Tensor]] = {}

    def hear(stage: str, done: int, total: int, detail: str) -> None:
        at[done] = {name: value.clone() for name, value in model.named_parameters()}

    curve = run(lottery_ticket, model, options, tmp_path, hear)
    assert len(curve.losses) == 7
    names = inside(model)
    total = sum(value.numel() for value in names.values())
    for done, left in {3: 0.8, 5: 0.64, 7: 0.64}.items():
        assert sum(int((at[done][name] != 0).sum()) for name in names) == pytest.approx(left * total, abs=2)
    for name, value in at[1].items():
        pruned = name in names
        again = at[3][name]
        if control == "random-weights" and pruned:
            assert not torch.equal(again[again != 0], value[again != 0])
        else:
            assert torch.equal(again, value * (again != 0) if pruned else value), name
    if control == "none":
        largest = max(float(value.abs().max()) for value in names.values())
        assert any(float(at[3][name].detach().abs().max()) > 0.5 * largest for name in names)


def test_the_course_of_levels():
    course = Course(steps=4, repeats=2, rewind=1)
    assert [course.place(step) for step in range(course.length)] == [0, 1, 2, 3, 1, 2, 3, 1, 2, 3]
    assert [step for step in range(course.length) if course.begins_again(step)] == [4, 7]


def test_a_level_cannot_go_back_to_its_end():
    with pytest.raises(ValueError, match="rewind 3 is not before the end"):
        LotteryOptions(steps=3, rewind=3)
