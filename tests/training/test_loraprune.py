"""LoRAPrune: the gradient that two small ones stand for, scores of units, and that masked is removed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from naive import random_weight
from penjing import api
from penjing.checkpoint import open_checkpoint
from penjing.errors import PlanError, RecipeError
from penjing.methods.adaptation.low_rank_change import LowRankChange
from penjing.methods.pruning import loraprune
from penjing.methods.pruning.loraprune import LoRAPruneOptions, MaskedUnits, estimated_gradient
from penjing.methods.training import TrainTask
from penjing.models.couplings import Coupling
from penjing.pipeline import trained
from penjing.training import Windows, train
from penjing.training.models import load_model
from runs import compress, recipe, texts
from tiny_models import token_windows

pytest.importorskip("accelerate")

SHORT: dict[str, Any] = {"batch_size": 2, "micro_batch": 2, "steps": 5, "every": 1, "rank": 4, "learning_rate": 1e-3}


@pytest.fixture
def short(tmp_path: Path) -> dict[str, Any]:
    return texts(tmp_path / "texts")


def trained_change(rows: int, columns: int, seed: int = 0) -> LowRankChange:
    """A change with values and gradients."""
    torch.manual_seed(seed)
    change = LowRankChange(torch.zeros(rows, columns), 3, 0.5)
    for part in (change.up, change.down):
        part.data = torch.randn_like(part)
        part.grad = torch.randn_like(part)
    return change


def test_the_worked_example() -> None:
    change = LowRankChange(torch.zeros(1, 2), 1, 1.0)
    change.up.data, change.down.data = torch.tensor([[1.0]]), torch.tensor([[1.0, 0.0]])
    change.up.grad, change.down.grad = torch.tensor([[2.0]]), torch.tensor([[0.0, 3.0]])
    assert estimated_gradient(change).tolist() == [[2.0, -3.0]]


def test_the_estimate_is_what_a_step_of_both_factors_does_to_their_product() -> None:
    change = trained_change(6, 5).double()
    up, down = change.up, change.down
    assert up.grad is not None and down.grad is not None
    stepped = (up - up.grad) @ (down - down.grad)
    torch.testing.assert_close(up @ down - stepped, estimated_gradient(change))


@pytest.mark.parametrize("transposed", [False, True])
def test_scores_of_units_are_slow_sums(transposed: bool) -> None:
    """Two units of two columns each in the consumer (3, 4), of one row each in the maker (2, 5); by loops in fp64."""
    weights = {"consumer": random_weight(3, 4), "maker": random_weight(2, 5)}
    columns, rows = torch.tensor([[0, 2], [1, 3]]), torch.tensor([[1], [0]])
    parts, expected = [], torch.zeros(2, dtype=torch.float64)
    for number, (name, weight) in enumerate(weights.items()):
        change = trained_change(*(weight.T if transposed else weight).shape, seed=number)
        index, reads = (columns, True) if name == "consumer" else (rows, False)
        stored = nn.Parameter(weight.T.contiguous() if transposed else weight)
        parts.append(loraprune._Part(stored, change, index, reads, transposed))
        change = change.double()
        matter = (estimated_gradient(change) * (stored.double() + 0.5 * change.up @ change.down)).abs()
        matter = matter.T if transposed else matter
        own = [sum(matter[:, i].sum() if reads else matter[i].sum() for i in unit) for unit in index.tolist()]
        norm = torch.stack(own).square().sum().sqrt()  # type: ignore[arg-type]
        expected += torch.stack([part / norm for part in own]).detach()
        change.float()
    units = MaskedUnits(Coupling("heads", "consumer", columns, {"maker": rows}), parts, nn.Linear(4, 3))
    units.look(0.75)
    torch.testing.assert_close(units.scores.double(), 0.25 * expected, rtol=1e-5, atol=0)
    units.look(0.75)
    torch.testing.assert_close(units.scores.double(), (0.75 * 0.25 + 0.25) * expected, rtol=1e-5, atol=0)
    units.mask(1)
    gone = int(expected.argmin())
    assert (units.gate == 0).nonzero().flatten().tolist() == columns[gone].tolist()


@pytest.mark.parametrize(
    ("family", "keys"),
    [("phi3", {}), ("gpt2", {"heads": False}), ("mixtral", {"neurons": False})],
)
def test_masked_is_removed(family, keys, tiny_model, short, tmp_path, monkeypatch) -> None:
    """The small model computes what the masked one did; both are stock checkpoints."""
    from transformers import AutoModelForCausalLM

    cut = trained.cut_units

    def also_keep(task: Any) -> Any:
        shutil.copytree(task.source.path, tmp_path / "masked")
        return cut(task)

    monkeypatch.setattr(trained, "cut_units", also_keep)
    steps = [{"method": "loraprune", "sparsity": 0.5, **SHORT, **keys}]
    if family == "gpt2":  # changes of pruned matrices are added before they multiply
        steps.insert(0, {"method": "magnitude", "sparsity": 0.2})
    report = compress(tiny_model(family), recipe(short, *steps, format="dense"), tmp_path / "out", evaluated=False)
    kept = report.made[-1]["kept"]
    assert set(kept) == {"heads", "neurons"} - set(keys)
    assert all(left == units // 2 for left, units in kept.values())
    models = [
        AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32).eval() for name in ("masked", "out")
    ]
    with torch.no_grad():
        wide, narrow = (model(token_windows(2, 24)).logits for model in models)
    torch.testing.assert_close(narrow, wide, rtol=0, atol=2e-5 * float(wide.abs().max()))
    assert models[1].num_parameters() < models[0].num_parameters()
    assert not list((tmp_path / "out").glob(".penjing/stage-*"))
    if family == "gpt2":
        weight = models[1].transformer.h[0].mlp.c_fc.weight
        assert 0.1 < float((weight == 0).float().mean()) < 0.3


def test_a_killed_run_goes_on(tiny_model, tmp_path) -> None:
    def run(directory: Path, hear: Any = lambda *_: None) -> tuple[Any, dict[str, Tensor]]:
        checkpoint = open_checkpoint(tiny_model("llama"))
        model = load_model(checkpoint)
        options = LoRAPruneOptions(**{**SHORT, "loss": "next-token"}, sparsity=0.5, save_every=1)
        torch.manual_seed(options.seed)  # as every step of a recipe that trains does before it draws its first weights
        training = loraprune.train(TrainTask(model, lambda: model, {}, checkpoint.config), options)
        batches = Windows(token_windows(6, 16), options.batch_size, options.micro_batch, options.seed)
        curve = train(training, batches, options, directory, marks={}, progress=hear)
        assert training.finish is not None
        return curve, dict(training.finish().named_parameters())

    def kill(stage: str, done: int, total: int, detail: str) -> None:
        if done == 3:
            raise KeyboardInterrupt

    curve, whole = run(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", kill)
    again, killed = run(tmp_path / "killed")
    assert again.losses == curve.losses
    assert all(torch.equal(value, killed[name]) for name, value in whole.items())
    down = whole["model.layers.0.mlp.down_proj.weight"]
    assert int((down == 0).all(0).sum()) == 48
    assert int((whole["model.layers.0.mlp.up_proj.weight"] == 0).all(1).sum()) == 48
    assert not any("low_rank" in name for name in whole)


@pytest.mark.parametrize(
    ("family", "step", "message"),
    [
        ("mixtral", {"sparsity": 0.5}, r"experts.0.w2.weight is no matrix of its own while mixtral is trained"),
        ("gpt2", {"sparsity": 0.5}, r"c_attn.weight would have shape \[64, 96\]"),
        ("llama", {"params": "10"}, "cannot be reached by removing heads and neurons alone"),
    ],
)
def test_what_cannot_be_is_refused_at_plan_time(family, step, message, tiny_model, short) -> None:
    with pytest.raises(PlanError, match=message):
        api.plan(tiny_model(family), recipe(short, {"method": "loraprune", **step}, format="dense"))


def test_keys_that_contradict_each_other(tiny_model, short) -> None:
    for keys, message in (({"heads": False, "neurons": False}, "nothing to remove"), ({"begin": 0.9}, "is not before")):
        with pytest.raises(RecipeError, match=message):
            api.plan(tiny_model("llama"), recipe(short, {"method": "loraprune", "sparsity": 0.5, **keys}))
