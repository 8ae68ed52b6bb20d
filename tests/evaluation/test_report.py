"""report.json, tables and the model card."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import yaml
from rich.console import Console

from penjing.errors import CheckpointError
from penjing.evaluation.card import model_card
from penjing.evaluation.report import Report, Software, read_report
from penjing.evaluation.tables import layers_table, summary_table


def _shown(table) -> str:
    console = Console(width=200, record=True, file=None, quiet=False)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_json_round_trip(report, tmp_path):
    text = report.to_json()
    assert Report.from_json(text) == report
    assert Report.from_json(text).to_json() == text
    (tmp_path / "report.json").write_text(text)
    assert read_report(tmp_path) == report


def test_keys_are_stable(report):
    assert set(json.loads(report.to_json())) == {
        "recipe", "format", "source", "modules", "predicted_bytes", "bytes", "software", "calibration", "sample",
        "quality", "protocol", "block_errors", "skipped", "peak_memory", "seconds", "verification", "schema",
        "bits_per_weight", "kv_cache", "made", "classification",
    }  # fmt: skip
    assert json.loads(report.to_json())["schema"] == 1


def test_infinity_becomes_null(report):
    hopeless = dataclasses.replace(report, quality=dataclasses.replace(report.quality, perplexity=math.inf))
    text = hopeless.to_json()
    assert json.loads(text)["quality"]["perplexity"] is None
    assert Report.from_json(text).quality.perplexity is None


def test_unmeasured_report(report):
    bare = dataclasses.replace(
        report, quality=None, protocol=None, calibration=None, peak_memory=None, seconds={}, verification={}, skipped=()
    )
    assert Report.from_json(bare.to_json()) == bare
    assert "not measured" in _shown(summary_table(bare))
    assert "was asked not to measure" in model_card(bare)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 2}, "schema 2 of the report is unknown"),
        ({"bytes": "many"}, "bytes"),
        ({"source": None}, "source"),
    ],
)
def test_what_does_not_fit_is_named(report, change, message):
    text = json.dumps(json.loads(report.to_json()) | change)
    with pytest.raises(CheckpointError, match=message):
        Report.from_json(text)


def test_missing_and_damaged_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"report\.json does not exist"):
        read_report(tmp_path)
    (tmp_path / "report.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"report\.json: not a report of penjing"):
        read_report(tmp_path)


def test_software_of_this_process():
    here = Software.here()
    assert here.torch and here.python and here.threads >= 1 and "cores" in here.cpu


def test_tables_take_a_report_or_its_json(report):
    shown = _shown(summary_table(report))
    assert shown == _shown(summary_table(json.loads(report.to_json())))
    for words in ("demo (dense)", "16.400", "17.900", "0.0870 ± 0.0015", "86.2%", report.protocol.sentence()[:60]):
        assert words in shown
    layers = _shown(layers_table(report))
    assert layers.index("layers.2.mlp.down_proj") < layers.index("layers.0.mlp.down_proj")
    assert "left dense: 64 % 48 != 0" in layers and "embed_tokens" not in layers


def test_module_role(report):
    assert {row.role for row in report.modules} == {"model.embed_tokens", "self_attn.q_proj", "mlp.down_proj"}


def test_card_front_matter_and_table(report):
    card = model_card(report, path="out/demo")
    _, front, body = card.split("---\n", 2)
    entries = yaml.safe_load(front)
    assert entries["base_model"] == "demo" and entries["tags"] == ["penjing", "gptq", "compressed-tensors"]
    assert "vllm serve out/demo" in body and 'from_pretrained("out/demo"' in body
    assert "| perplexity | 16.400 | 17.900 |" in body
    assert report.protocol.sentence() in body
    assert "`model.layers.1.mlp.down_proj`: 64 % 48 != 0." in body
    recipe = body.split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(recipe) == report.recipe


@pytest.mark.parametrize("format", ["dense", "compressed-tensors", "native"])
def test_every_format_says_how_to_load_it(report, format):
    assert "AutoModelForCausalLM" in model_card(dataclasses.replace(report, format=format))
