"""Recipes that choose bits for every linear when the work begins."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from penjing import api
from penjing.errors import PlanError, RecipeError
from penjing.methods import METHODS
from penjing.pipeline import shares
from penjing.pipeline.journal import FOLDER
from penjing.recipe import load_recipe
from runs import compress, penjing, recipe, shards, stopped_before_the_walk, texts

GPTQ = {"method": "gptq", "bits": 3, "group_size": 32}
FULL = {**GPTQ, "asymmetric": True, "stream": True, "descent": 2}
ALLOCATE = {"choices": "2,3,4,6", "samples": 2}


@pytest.fixture
def short(tmp_path: Path) -> dict[str, Any]:
    return texts(tmp_path / "texts")


def test_the_result_is_that_of_the_recipe_found_and_takes_no_byte_more(
    tiny_model: Any, short: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model("llama", layers=4)
    uniform = api.plan(model, recipe(short, GPTQ))
    report = compress(model, recipe(short, GPTQ, allocate=ALLOCATE), tmp_path / "own")
    assert report.predicted_bytes <= uniform.bytes
    assert len({row.bits for row in report.modules if row.bits}) > 1
    assert report.methods == ["gptq"], "one step per choice is one method to people"
    assert not list((tmp_path / "own" / FOLDER).glob("allocated*"))
    written = yaml.safe_load((tmp_path / "own" / "recipe.yaml").read_text(encoding="utf-8"))
    assert written["allocate"] is None and report.recipe == load_recipe(written).as_dict()
    few = short | {"calibration": short["calibration"] | {"samples": 4}}
    by_hand = api.allocate(model, recipe(few, GPTQ), budget=uniform.bytes, choices="2,3,4,6")
    assert by_hand.cost <= uniform.bytes
    compress(model, tmp_path / "own" / "recipe.yaml", tmp_path / "again")
    assert shards(tmp_path / "again") == shards(tmp_path / "own")


def test_together_with_all_that_trains_and_weighs(tiny_model: Any, short: dict[str, Any], tmp_path: Path) -> None:
    short["calibration"] |= {"written": 0.5, "token_weights": "gradient"}
    train = {"method": "e2e-qp", "iterations": 2, "batch_size": 2}
    wanted = recipe(short, FULL, train, allocate=ALLOCATE)
    report = compress(tiny_model("llama"), wanted, tmp_path / "out", engine=True)
    assert report.verification["how"] == "transformers"
    assert all("e2e-qp" in row.steps for row in report.modules if row.bits)


def test_a_stopped_run_goes_on_with_the_same_shares(
    tiny_model: Any, short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, wanted = tiny_model("llama"), recipe(short, GPTQ, allocate=ALLOCATE)
    compress(model, wanted, tmp_path / "whole", evaluated=False)
    stopped_before_the_walk(model, wanted, tmp_path / "out")
    monkeypatch.setattr(shares, "allocate", lambda *_, **__: pytest.fail("measured twice"))
    compress(model, wanted, tmp_path / "out", evaluated=False)
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def test_measuring_leaves_out_what_only_takes_time() -> None:
    method = METHODS["gptq"]
    rough = method.rough(method.options(**{key: value for key, value in FULL.items() if key != "method"}))
    assert rough == method.options(bits=3, group_size=32)
    plain = METHODS["rtn"].options(bits=3)
    assert METHODS["rtn"].rough(plain) is plain


@pytest.mark.parametrize(
    ("steps", "allocate", "reason"),
    [
        ([GPTQ], {"choices": "4,6"}, "least|fits|takes"),
        ([GPTQ], {"choices": "3"}, "two or more choices"),
        ([GPTQ], {"choices": "2,x"}, "neither bits"),
        ([{"method": "wanda", "sparsity": 0.5}], {"choices": "2,3"}, "no step of the recipe has `bits`"),
        ([{"method": "shortgpt", "drop": 1}, GPTQ], {"choices": "2,3"}, "removes blocks"),
    ],
)
def test_what_has_no_answer_is_refused_before_the_work(
    steps: Any, allocate: dict[str, Any], reason: str, tiny_model: Any, short: dict[str, Any], tmp_path: Path
) -> None:
    model, wanted = tiny_model("llama"), recipe(short, *steps, allocate=allocate)
    with pytest.raises(PlanError, match=reason):
        compress(model, wanted, tmp_path / "out")
    with pytest.raises(PlanError, match=reason):
        api.plan(model, wanted)
    assert not (tmp_path / "out").exists()


def test_a_wrong_key_is_named(short: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="choises"):
        load_recipe(recipe(short, GPTQ, allocate={"choises": "2,3"}))


def test_the_plan_says_so(tiny_model: Any, short: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe(short, GPTQ, allocate=ALLOCATE)), encoding="utf-8")
    told = penjing("plan", tiny_model("llama"), "-r", path)
    assert told.returncode == 0, told.stderr
    assert "2,3,4,6" in told.stdout + told.stderr
