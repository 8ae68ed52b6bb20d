"""Nothing in silence: what is not as asked reaches the report; every number carries its protocol."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penjing import api
from runs import compress, recipe, texts

GPTQ = {"method": "gptq", "group_size": 32}


@pytest.fixture
def short(tmp_path: Path) -> dict[str, Any]:
    return texts(tmp_path / "texts")


def notes(report) -> dict[str, tuple[str, ...]]:
    return {row.name: row.notes for row in report.modules if row.notes}


def test_damping(tiny_model, short, tmp_path) -> None:
    """128 tokens cannot fill a Gram matrix of 160 inputs, and without damping it has no inverse."""
    model = tiny_model("llama", inner=160)
    report = compress(model, recipe(short, GPTQ | {"damping": 0.0}), tmp_path / "out", evaluated=False)
    told = notes(report)
    assert "model.layers.0.mlp.down_proj" in told
    assert "damping" in told["model.layers.0.mlp.down_proj"][0]
    assert "damping" in (tmp_path / "out" / "report.html").read_text()


def test_experts_that_see_no_token(tiny_model, short, tmp_path) -> None:
    """Two tokens with two experts each leave at least half of eight experts without calibration."""
    short["calibration"] |= {"samples": 1, "length": 2}
    model = tiny_model("mixtral", num_local_experts=8)
    report = compress(model, recipe(short, GPTQ), tmp_path / "out", evaluated=False)
    unseen = [name for name, said in notes(report).items() if any("no calibration token" in note for note in said)]
    assert len(unseen) >= 2 * 4 * 3
    assert all(".experts." in name for name in unseen)
    assert "no calibration token" in (tmp_path / "out" / "report.html").read_text()


def test_experts_that_cannot_aim_at_the_dense_model(tiny_model, short, tmp_path) -> None:
    steps = GPTQ | {"asymmetric": True, "stream": True}
    report = compress(tiny_model("mixtral"), recipe(short, steps), tmp_path / "out", evaluated=False)
    own = {row.name: any("its own inputs" in note for note in row.notes) for row in report.modules if row.steps}
    assert all(told == (".experts." in name) for name, told in own.items())
    assert any(own.values())


def test_inputs_that_cannot_be_rescaled(tiny_model, short, tmp_path) -> None:
    awq = {"method": "awq", "group_size": 32, "steps": 2, "ignore": ["*.q_proj"]}
    report = compress(tiny_model("llama"), recipe(short, awq, format="native"), tmp_path / "out", evaluated=False)
    told = notes(report)
    assert "no norm or linear before it" in told["model.layers.0.self_attn.o_proj"][0]
    assert "do not take part" in told["model.layers.1.self_attn.k_proj"][0]
    assert "model.layers.0.mlp.down_proj" not in told


def test_removed_blocks(tiny_model, short, tmp_path) -> None:
    model = tiny_model("llama", layers=4)
    report = compress(model, recipe(short, {"method": "shortgpt", "drop": 2}, format="dense"), tmp_path / "out")
    assert len(report.skipped) == 2
    assert all("removed by shortgpt: score" in entry.reason for entry in report.skipped)


def test_the_protocol_stands_beside_the_numbers(tiny_model, short, tmp_path) -> None:
    report = compress(tiny_model("llama"), recipe(short, GPTQ), tmp_path / "out")
    assert report.protocol is not None and report.calibration is not None
    sentence = report.protocol.sentence()
    assert "evaluation.txt" in sentence and "2 windows of 32 tokens" in sentence
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written["protocol"]["sentence"] == sentence
    assert {"perplexity", "reference_perplexity", "kl"} <= written["quality"].keys()
    assert written["calibration"]["corpus"] == "calibration.txt"
    for page in ("report.html", "README.md"):
        assert "evaluation.txt" in (tmp_path / "out" / page).read_text()
    measured = api.evaluate(tmp_path / "out", against=tiny_model("llama"), **short["evaluation"]).as_dict()
    assert measured["protocol"]["sentence"] == sentence
    assert measured["kl"] == pytest.approx(written["quality"]["kl"], rel=1e-5)
