"""Blocks as a choice of an allocation: what their absence costs, recipes without them, budgets kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from penjing import api
from penjing.checkpoint import open_checkpoint
from penjing.errors import PlanError
from penjing.models import layout_of
from penjing.pipeline import measure
from penjing.pipeline.removals import losses_without
from penjing.pipeline.stream import StreamedModel
from penjing.pipeline.subset import BlockSubset
from penjing.pipeline.weights import Weights
from runs import compress, recipe, texts
from tiny_models import build, token_windows

RTN: dict[str, Any] = {"method": "rtn", "group_size": 32}
TABLE: dict[str, Any] = RTN | {"bits": 8, "targets": ["embedding"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("gemma3", tmp_path_factory.mktemp("removals"), layers=4)


@pytest.fixture
def short(tmp_path: Path) -> dict[str, Any]:
    return texts(tmp_path / "texts")


def test_losses_are_those_of_models_without_the_block(model: Path) -> None:
    checkpoint, tokens = open_checkpoint(model), token_windows()
    layout = layout_of(checkpoint.config, checkpoint.specs())
    dense = StreamedModel(checkpoint.config, layout, Weights(checkpoint, layout).live)
    found = losses_without(dense, tokens, lambda *said: None)
    reference = measure.run(dense, tokens)
    for gone in range(layout.blocks):
        view = BlockSubset(checkpoint, layout, [index for index in range(layout.blocks) if index != gone])
        shorter = layout_of(view.config, view.specs())
        other = measure.run(StreamedModel(view.config, shorter, Weights(view, shorter).live), tokens)
        kl = measure.compare(other, tokens, reference).result().kl
        assert found[gone] == pytest.approx(kl, rel=1e-4)


def test_a_budget_that_only_fewer_blocks_meet(model: Path, tmp_path: Path, short: dict[str, Any]) -> None:
    """Numbers in the recipe are those of the model without the blocks; the rest of the recipe holds as before."""
    wanted = recipe(short, RTN, TABLE, format="native")
    plain = api.plan(model, wanted)
    blocks = sum(row.bytes for row in plain.rows if row.module.block is not None)
    budget = plain.bytes - blocks // 2 + blocks // 16
    result = api.allocate(model, wanted, budget=budget, choices="4,8,drop", generations=1, offspring=2)
    assert result.removed and result.plan.bytes == result.cost <= budget
    assert result.recipe.steps[0].method == "named-blocks"
    assert result.plan.layout.blocks == 4 - len(result.removed)
    rows = {row.module.name: row for row in result.plan.rows}
    assert all(row.scheme.grid is not None for row in rows.values() if row.module.kind in ("linear", "embedding"))
    report = compress(model, result.recipe.as_dict(), tmp_path / "out")
    assert sum(row.bytes for row in report.modules) == result.plan.bytes
    said = result.as_dict()
    assert {unit["choice"] for unit in said["units"]} >= {"drop"} and said["cost"] == result.cost
    assert result.refined is not None and result.refined[1] <= result.refined[0]


def test_parameters_and_blocks(model: Path, short: dict[str, Any]) -> None:
    wanted = recipe(short, RTN, format="native")
    dense = api.inspect(model).layout
    result = api.allocate(model, wanted, params=int(dense.parameters * 0.7), choices="dense,drop")
    assert result.plan.layout.parameters == result.cost <= result.budget


def test_refusals(model: Path, short: dict[str, Any]) -> None:
    wanted = recipe(short, RTN, format="native")
    for keys, words in (
        ({"budget": 1000, "choices": "4,drop"}, r"with one block left and the smallest choices in it the model takes"),
        ({"bits": 4, "choices": "4,8,drop", "by": "output"}, r"`drop` is judged by the KL"),
    ):
        with pytest.raises(PlanError, match=words):
            api.allocate(model, wanted, **keys)  # type: ignore[arg-type]
    for blocks, words in (([7], "no block 7"), ([0, 1, 2, 3], "at least one must stay")):
        with pytest.raises(PlanError, match=words):
            api.plan(model, recipe(short, {"method": "named-blocks", "blocks": blocks}, format="dense"))


def test_named_blocks_are_those_that_go(model: Path, tmp_path: Path, short: dict[str, Any]) -> None:
    compress(model, recipe(short, {"method": "named-blocks", "blocks": [1]}, format="dense"), tmp_path / "out")
    before, after = open_checkpoint(model), open_checkpoint(tmp_path / "out")
    for old, new in ((0, 0), (2, 1), (3, 2)):
        name = "model.layers.{}.mlp.down_proj.weight"
        assert torch.equal(before.load(name.format(old)), after.load(name.format(new)))
