"""Encoders from the plan to the verified classifier: every step, every family, every refusal."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from penjing import api, tables
from penjing.errors import CalibrationError, PlanError
from penjing.methods import METHODS
from penjing.pipeline import encoders
from tiny_encoders import CLASSES, ENCODERS, PIECES, build, labelled, tokenizer
from tiny_models import build as build_decoder

pytest.importorskip("accelerate")

KEPT = 256


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    labelled(folder / "train.jsonl", 128)
    labelled(folder / "test.jsonl", 32, seed=1)
    return folder


def classify(files: Path, **keys: Any) -> dict[str, Any]:
    data = str(files / "train.jsonl")
    return {"method": "classify", "data": data, "classes": CLASSES, "steps": 40, "learning_rate": 5e-3, **keys}


def distil(files: Path, **keys: Any) -> dict[str, Any]:
    data = str(files / "train.jsonl")
    return {"method": "distil-encoder", "data": data, "steps": 30, "learning_rate": 5e-3, **keys}


def trim(files: Path) -> dict[str, Any]:
    return {"method": "trim-vocabulary", "data": str(files / "train.jsonl"), "keep": KEPT}


def recipe(files: Path, *steps: dict[str, Any], **keys: Any) -> dict[str, Any]:
    evaluation = {"data": str(files / "test.jsonl"), "length": 32}
    return {"version": 1, "format": "dense", "steps": list(steps), "evaluation": evaluation, **keys}


def printed(table: Any) -> str:
    text = io.StringIO()
    Console(width=200, file=text).print(table)
    return text.getvalue()


@pytest.fixture(scope="module")
def finished(files, tmp_path_factory) -> Path:
    """A bare BERT made into a classifier, its vocabulary trimmed, and a student of half its blocks."""
    folder = tmp_path_factory.mktemp("run")
    student = distil(
        files,
        student={"layers": 2},
        hidden=1.0,
        attention=0.1,
        relations=0.1,
        relation_heads=4,
        transfer_first=0.3,
    )
    steps = (classify(files, head_rate=2.0), trim(files), student)
    api.compress(build("bert", folder / "model"), recipe(files, *steps), folder / "out")
    return folder / "out"


def test_a_run_makes_trims_and_distils_a_classifier(finished, files):
    report = json.loads((finished / "report.json").read_text())
    counts = [entry["parameters"] for entry in report["made"]]
    assert counts[0] - counts[1] == 32 * (len(PIECES) - KEPT) and counts[2] < counts[1]
    assert report["made"][0]["accuracy"] == report["made"][1]["accuracy"] > 0.9, "trimming changes no known text"
    assert report["made"][1]["covered"] == 1.0
    assert report["classification"]["accuracy"] > 0.9 and report["classification"]["texts"] == 32
    assert report["predicted_bytes"] == 4 * counts[2]
    assert report["verification"]["passed"] and report["verification"]["how"] == "transformers"
    measured = api.evaluate(finished, data=str(files / "test.jsonl"))
    assert measured.classification.accuracy == report["classification"]["accuracy"]
    assert measured.parameters == counts[2]
    for shown in (tables.report(report), tables.evaluation(measured.as_dict())):
        assert "accuracy" in printed(shown) and "32 labelled texts" in printed(shown)
    assert "text-classification" in (finished / "README.md").read_text()


def test_what_is_written_is_a_stock_classifier(finished):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(finished)
    words = AutoTokenizer.from_pretrained(finished)
    assert list(model.config.id2label.values()) == CLASSES and model.config.num_hidden_layers == 2
    assert len(words) == KEPT == model.get_input_embeddings().weight.shape[0]
    text = "the old river near a candle"
    assert words.tokenize(text) == tokenizer().tokenize(text)
    assert words.convert_ids_to_tokens(words(text)["input_ids"])[::7] == ["[CLS]", "[SEP]"]
    assert words.tokenize("zebra") == ["z", "##e", "##b", "##r", "##a"], "what is gone is spelled"


@pytest.fixture
def read_back_here(monkeypatch):
    """Results are read back in this process only, which saves one."""
    monkeypatch.setattr(encoders, "fits_in_memory", lambda parameters: False)


@pytest.mark.usefixtures("read_back_here")
@pytest.mark.parametrize("family", ["distilbert", "roberta"])
def test_other_families_are_classified_and_distilled(family, files, tmp_path):
    steps = (classify(files, steps=2), distil(files, steps=2, student={"layers": 2}, attention=0.1))
    report = api.compress(build(family, tmp_path / "model"), recipe(files, *steps), tmp_path / "out")
    assert report.verification["passed"]
    assert report.predicted_bytes == 4 * report.made[-1]["parameters"]
    assert api.inspect(tmp_path / "out").layout.blocks == 2


@pytest.mark.usefixtures("read_back_here")
def test_a_student_learns_in_two_stages(files, tmp_path):
    model = build("bert", tmp_path / "model", bare=False)
    general = distil(files, steps=2, stage="general", student={"layers": 2}, hidden=1.0)
    report = api.compress(model, recipe(files, general, distil(files, steps=2)), tmp_path / "out")
    losses = [entry["curve"]["losses"] for entry in report.made]
    assert len(losses) == 2 and all(loss > 0 for curve in losses for loss in curve)


def test_a_body_is_distilled_and_trimmed_without_a_head(files, tmp_path):
    general = distil(files, steps=2, stage="general", student={"layers": 2}, relations=1.0, relation_heads=4)
    model = build("bert", tmp_path / "model")
    report = api.compress(model, recipe(files, trim(files), general), tmp_path / "out", evaluated=False)
    assert report.verification["how"] == "transformers" and report.classification is None
    assert not any("classifier" in name for name in load_file(tmp_path / "out" / "model.safetensors"))
    assert api.plan(tmp_path / "out", recipe(files, classify(files))).layout.parameters > 0


@pytest.mark.usefixtures("read_back_here")
def test_layers_of_the_teacher_are_where_a_student_begins(files, tmp_path):
    model = build("bert", tmp_path / "model", bare=False)
    step = distil(files, steps=1, learning_rate=1e-12, weight_decay=0.0, student={"layers": 2})
    api.compress(model, recipe(files, step), tmp_path / "out", evaluated=False)
    before, after = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "out"))
    for old, new in ((0, 0), (3, 1)):
        name = "bert.encoder.layer.{}.output.dense.weight"
        assert torch.allclose(before[name.format(old)], after[name.format(new)], atol=1e-6)


def test_decoders_and_encoders_are_told_apart(files, tmp_path):
    encoder = build("bert", tmp_path / "encoder")
    decoder = build_decoder("llama", tmp_path / "decoder")
    for name in (name for name, method in METHODS.items() if method.reads == "encoder"):
        step = {"classify": classify, "distil-encoder": distil}.get(name, trim)(files)
        with pytest.raises(PlanError, match="llama is a decoder"):
            api.plan(decoder, recipe(files, step))
    for step in (
        {"method": "gptq"},
        {"method": "distil", "student": {"layers": 1}},
        {"method": "wanda", "sparsity": 0.5},
    ):
        with pytest.raises(PlanError, match="bert is an encoder"):
            api.plan(encoder, recipe(files, step))
    with pytest.raises(PlanError, match="is an encoder"):
        api.export(encoder, "native", tmp_path / "exported")
    with pytest.raises(PlanError, match="format: dense"):
        api.plan(encoder, recipe(files, classify(files)) | {"format": "native"})
    with pytest.raises(PlanError, match="max_bytes"):
        api.plan(encoder, recipe(files, classify(files), require={"max_kl": 0.1}))


def test_refusals_name_what_is_wrong(files, tmp_path):
    bare = build("bert", tmp_path / "bare")
    with pytest.raises(PlanError, match="no head for classes"):
        api.evaluate(bare, data=str(files / "test.jsonl"))
    with pytest.raises(PlanError, match="labelled texts"):
        api.compress(bare, recipe(files, classify(files), evaluation={}), tmp_path / "out")
    with pytest.raises(PlanError, match="600 tokens cannot be kept"):
        api.plan(bare, recipe(files, trim(files) | {"keep": 600}))
    with pytest.raises(PlanError, match="not unique"):
        api.plan(bare, recipe(files, classify(files, classes=["a", "a"])))
    with pytest.raises(PlanError, match="merged from each other"):
        api.plan(build("roberta", tmp_path / "roberta"), recipe(files, trim(files)))
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text('{"text": "rain", "label": "earth"}', encoding="utf-8")
    with pytest.raises(CalibrationError, match=r"line 1.*'earth'.*water, fire"):
        api.compress(bare, recipe(files, classify(files, data=str(wrong))), tmp_path / "out2", evaluated=False)
    with pytest.raises(PlanError, match="`classify` first"):
        api.plan(bare, recipe(files, distil(files, student={"layers": 2})))
    step = distil(files, teacher=str(bare))
    with pytest.raises(PlanError, match="teacher LABEL_0, LABEL_1"):
        api.compress(build("bert", tmp_path / "other", bare=False), recipe(files, step), tmp_path / "out3")


@pytest.mark.parametrize("family", ENCODERS)
def test_layouts_are_those_of_transformers(family, tmp_path):
    for bare in (True, False):
        model = build(family, tmp_path / f"{bare}", bare=bare)
        layout = api.inspect(model).layout
        stored = load_file(model / "model.safetensors")
        ours = {name for module in layout.modules for name in module.tensor_names()}
        assert layout.encoder and layout.blocks == 4
        if not bare:
            assert ours == set(stored)
            assert layout.parameters == sum(tensor.numel() for tensor in stored.values())
