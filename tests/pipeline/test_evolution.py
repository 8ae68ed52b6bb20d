"""Choices of several families in one budget, and the search on measured KL: what it measures is what is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from penjing import api
from penjing.errors import PlanError
from penjing.pipeline.choices import Choice, read_choices
from runs import compress, recipe, texts

RTN: dict[str, Any] = {"method": "rtn", "group_size": 32}


@pytest.fixture
def short(tmp_path: Path) -> dict[str, Any]:
    return texts(tmp_path / "texts")


def test_words() -> None:
    words = "dense, 4, 3g64, 50%, 2:4, 2:4+4, 37.5%+3g32, ternary, wanda(sparsity=0.3), bcq(bits=2 group_size=32)"
    choices = read_choices(words)
    assert ", ".join(map(str, choices)) == words
    assert choices[0].dense and choices[5] == Choice(4, None, None, "2:4") and choices[6].sparsity == 0.375
    assert choices[-1].keys == (("bits", 2), ("group_size", 32))
    for wrong in ("4+2:4", "2:4+", "50%4", "+4", "", "wanda(sparsity)", "shortgpt", "four"):
        with pytest.raises(PlanError, match="choice"):
            read_choices(f"4,{wrong}")


def test_families_mix_in_one_budget(tiny_model: Any, tmp_path: Path, short: dict[str, Any]) -> None:
    choices = "dense,8,4,2,2:4+4,50%,ternary(group_size=32)"
    result = api.allocate(tiny_model("llama"), recipe(short, RTN, format="native"), bits=4.2, choices=choices)
    assert result.plan.bytes <= result.budget * 1.001
    assert len({share.chosen for share in result.shares}) > 1
    sizes = {str(choice): size for choice, size in zip(result.choices, result.shares[0].bytes, strict=True)}
    assert sizes["ternary(group_size=32)"] < sizes["2"] < sizes["2:4+4"] < sizes["4"] < sizes["8"] < sizes["dense"]
    report = compress(tiny_model("llama"), result.recipe.as_dict(), tmp_path / "out")
    assert sum(row.bytes for row in report.modules) == pytest.approx(result.plan.bytes, rel=0.01)


def test_sparsities_are_choices(tiny_model: Any, short: dict[str, Any]) -> None:
    wanted = recipe(short, {"method": "wanda", "sparsity": 0.5}, format="native")
    result = api.allocate(tiny_model("gpt2"), wanted, bits=18, choices="20%,50%,80%", by="output")
    assert {step.method for step in result.recipe.steps} == {"wanda"}
    assert {round(step.options.sparsity, 2) for step in result.recipe.steps} <= {0.2, 0.5, 0.8}  # type: ignore[attr-defined]
    with pytest.raises(PlanError, match="method wanda has no `bits`"):
        api.allocate(tiny_model("gpt2"), wanted, bits=8, choices="50%,4")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_search_never_loses_and_measures_what_is_written(
    family: str, tiny_model: Any, tmp_path: Path, short: dict[str, Any]
) -> None:
    model, wanted = tiny_model(family), recipe(short, RTN, format="native")
    plain = api.allocate(model, wanted, bits=3.6, choices="2,3,4,8")
    result = api.allocate(model, wanted, bits=3.6, choices="2,3,4,8", generations=4, offspring=6)
    assert plain.refined is None and result.refined is not None
    assert result.plan.bytes <= result.budget == plain.budget
    assert result.refined[1] <= result.refined[0]
    report = compress(model, result.recipe.as_dict(), tmp_path / "out")
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    assert report.quality is not None
    tokens = _calibration(model, wanted)
    with torch.no_grad():
        expected, found = (torch.log_softmax(one(tokens).logits[:, :-1].double(), -1) for one in (dense, written))
    kl = float((expected.exp() * (expected - found)).sum(-1).mean())
    assert kl == pytest.approx(result.refined[1], rel=0.05)  # weights are kept in bf16 while searching


def _calibration(model: Any, wanted: Any) -> torch.Tensor:
    from penjing.checkpoint import open_checkpoint
    from penjing.pipeline.text import TextSource
    from penjing.recipe import load_recipe

    return TextSource(open_checkpoint(model)).calibration(load_recipe(wanted).calibration).tokens[:4, :256]
