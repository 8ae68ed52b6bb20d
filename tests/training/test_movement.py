"""Movement pruning: whose gradient a score has, how many weights go, which may come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from naive import random_weight
from penjing.checkpoint import open_checkpoint
from penjing.methods.adaptation.low_rank_change import matrices
from penjing.methods.pruning import movement
from penjing.methods.pruning.gradual import cubic
from penjing.methods.pruning.movement import MovementOptions, Moving, narrow
from penjing.methods.training import TrainTask
from penjing.training import Windows, train
from penjing.training.models import load_model
from tiny_models import token_windows

pytest.importorskip("accelerate")

SHORT: dict[str, Any] = {"batch_size": 2, "micro_batch": 2, "loss": "next-token", "learning_rate": 1e-3, "steps": 8}


def run(model: nn.Module, options: MovementOptions, directory: Path, kept: Any = None, hear: Any = None) -> Any:
    training = movement.train(TrainTask(model, lambda: model, kept or {}), options)
    batches = Windows(token_windows(6, 16), options.batch_size, options.micro_batch, options.seed)
    curve = train(training, batches, options, directory, marks={}, progress=hear or (lambda *_: None))
    assert training.finish is not None
    return curve, training.finish()


def inside(model: nn.Module) -> dict[str, Tensor]:
    return {name: module.get_parameter(own).detach() for name, module, own in matrices(model)}


def test_a_score_has_the_slope_of_the_loss_by_the_mask() -> None:
    """By finite differences in fp64; the weight's own gradient is that of the masked model."""
    torch.manual_seed(0)
    weight, inputs = random_weight(3, 5).double(), torch.randn(9, 5).double()
    moving = Moving(weight, None).double()
    moving.mask[1] = False

    def loss(mask: Tensor) -> Tensor:
        return torch.tanh(inputs @ (weight * mask).T).square().sum()

    leaf = weight.clone().requires_grad_()
    torch.tanh(inputs @ moving(leaf).T).square().sum().backward()
    mask = moving.mask.double()
    assert moving.scores.grad is not None and leaf.grad is not None
    for row, column in [(0, 0), (1, 2), (2, 4)]:
        step = torch.zeros_like(mask)
        step[row, column] = 1e-6
        slope = (loss(mask + step) - loss(mask - step)) / 2e-6
        assert float(moving.scores.grad.view(3, 5)[row, column]) == pytest.approx(float(slope), rel=1e-5, abs=1e-8)
    assert not leaf.grad[1].any() and leaf.grad[0].all()


def test_the_worked_example() -> None:
    """Weights of one size, of which descent draws one towards zero."""
    moving, weight = Moving(torch.tensor([[1.0, -1.0]]), None), torch.tensor([[1.0, -1.0]])
    (-moving(weight).sum()).backward()
    assert moving.scores.grad is not None and moving.scores.grad.tolist() == [-1.0, 1.0]
    moving.scores.data -= 0.1 * moving.scores.grad
    narrow([moving], 0.5, "layer")
    assert moving.mask.tolist() == [[True, False]]


def test_scores_compete_over_the_model_or_within_a_matrix() -> None:
    first, second = (Moving(torch.ones(2, 2), None) for _ in range(2))
    first.scores.data = torch.tensor([1.0, 2, 3, 4])
    second.scores.data = torch.tensor([5.0, 6, 7, 8])
    narrow([first, second], 0.5, "layer")
    assert [one.mask.flatten().tolist() for one in (first, second)] == [[False, False, True, True]] * 2
    narrow([first, second], 0.5, "global")
    assert not first.mask.any() and second.mask.all()


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_counts_follow_the_schedule_and_earlier_zeros_stay(scope, tiny_model, tmp_path) -> None:
    model = load_model(open_checkpoint(tiny_model("llama")))
    name = "model.layers.0.mlp.up_proj.weight"
    kept = {name: torch.rand_like(inside(model)[name]) > 0.2}
    masks: list[dict[str, Tensor]] = []

    def hear(*said: Any) -> None:
        masks.append({key: value.clone() for key, value in model.named_buffers() if key.endswith(".mask")})

    options = MovementOptions(**SHORT, every=1, begin=0.25, until=0.75, sparsity=0.6, scope=scope, weight_decay=0.1)
    _, done = run(model, options, tmp_path, kept, hear)
    found = inside(done)
    sizes = {key: value.numel() for key, value in found.items()}
    wanted = cubic(2, 4, 0, 0.6)
    if scope == "layer":
        assert all(int((found[key] == 0).sum()) == int(size * 0.6 + 1e-6) for key, size in sizes.items())
        assert all(int((~mask).sum()) == int(mask.numel() * wanted + 1e-6) for mask in masks[3].values())
    else:
        assert sum(int((value == 0).sum()) for value in found.values()) == int(sum(sizes.values()) * 0.6 + 1e-6)
    assert not found[name][~kept[name]].any()
    assert any((~before & after).any() for key, after in masks[-1].items() for before in [masks[-2][key]])
    assert not any("parametrizations" in key for key in done.state_dict())


def test_a_killed_run_goes_on(tiny_model, tmp_path) -> None:
    options = MovementOptions(**{**SHORT, "steps": 5}, every=1, save_every=1)
    whole = load_model(open_checkpoint(tiny_model("llama")))
    curve, whole = run(whole, options, tmp_path / "whole")

    def kill(stage: str, done: int, total: int, detail: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(load_model(open_checkpoint(tiny_model("llama"))), options, tmp_path / "killed", None, kill)
    again, killed = run(load_model(open_checkpoint(tiny_model("llama"))), options, tmp_path / "killed")
    assert again.losses == curve.losses
    assert all(torch.equal(value, inside(killed)[name]) for name, value in inside(whole).items())


def test_a_schedule_begins_before_it_ends() -> None:
    with pytest.raises(ValueError, match=r"begin 0.8 is not before until 0.7"):
        MovementOptions(begin=0.8)
