"""One table of cases: compress, write, load in a fresh process as a user would, compare logits, evaluate."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from end_to_end_cases import CASES, UNLISTED, Case, four, step
from penjing import api
from penjing.errors import PlanError
from penjing.evaluation.report import Report, read_report
from penjing.methods import METHODS
from penjing.pipeline import load_probe
from penjing.pipeline.verification import TOLERANCE
from runs import compress, recipe, shards, texts
from tiny_models import FAMILIES

pytest.importorskip("compressed_tensors")
pytest.importorskip("accelerate")

NO_NORM_BEFORE = ("olmo2",)
"""Families in which no norm feeds a linear, so that nothing can be smoothed."""


@dataclass(frozen=True)
class Run:
    """A written case and the model it came from."""

    case: Case
    model: Path
    directory: Path
    report: Report


@pytest.fixture(scope="module")
def short_texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return texts(tmp_path_factory.mktemp("texts"))


class Runs:
    """The cases that were asked for, each written once."""

    def __init__(self, tiny_model: Any, short_texts: dict[str, Any], folder: Path) -> None:
        self._tiny_model, self._texts, self._folder = tiny_model, short_texts, folder
        self._done: dict[str, Run | Exception] = {}

    def __getitem__(self, name: str) -> Run:
        """The written case. Raises what its run raised."""
        if name not in self._done:
            self._done[name] = self._write(name, CASES[name])
        run = self._done[name]
        if isinstance(run, Exception):
            raise run
        return run

    def _write(self, name: str, case: Case) -> Run | Exception:
        model = self._tiny_model(case.family, **({"layers": 4} if "shortgpt" in name else {}) | case.model)
        chosen = self._texts | {"calibration": self._texts["calibration"] | case.calibration}
        wanted = recipe(chosen, *case.steps, format=case.format, **case.keys)
        directory = self._folder / str(len(self._done))
        try:
            return Run(case, model, directory, compress(model, wanted, directory))
        except Exception as error:
            return error


CHUNK = 24
"""Cases that one process loads: starting it takes longer than loading a tiny model."""


class Loaded:
    """Logits that fresh processes got, or why they failed; only the native format needs penjing there."""

    def __init__(self, runs: Runs, folder: Path) -> None:
        self._runs, self._folder = runs, folder
        self._found: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._found:
            number = list(CASES).index(name) // CHUNK
            chunk = list(CASES)[number * CHUNK : (number + 1) * CHUNK]
            for native in (False, True):
                self._load([case for case in chunk if (CASES[case].format == "native") == native], native)
        return self._found[name]

    def _load(self, names: list[str], native: bool) -> None:
        runs = {}
        for name in names:
            with suppress(Exception):  # told by the tests of that case
                runs[name] = self._runs[name]
        if not runs:
            return
        output = self._folder / str(len(self._found))
        output.mkdir()
        command = [sys.executable, str(Path(__file__).with_name("load_runs.py")), load_probe.__file__, str(output)]
        command += [str(run.directory) for run in runs.values()] + (["--import", "penjing"] if native else [])
        subprocess.run(command, check=True, capture_output=True, env=os.environ)
        told = json.loads((output / "told.json").read_text())
        assert told["imported"] == native
        for number, (name, run) in enumerate(runs.items()):
            self._found[name] = told["failures"].get(str(run.directory), output / f"{number}.safetensors")


@pytest.fixture(scope="module")
def written(tiny_model, short_texts, tmp_path_factory) -> Runs:
    return Runs(tiny_model, short_texts, tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="module")
def loaded(written, tmp_path_factory) -> Loaded:
    return Loaded(written, tmp_path_factory.mktemp("loaded"))


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_process_loads_what_was_in_memory(name: str, written, loaded) -> None:
    run = written[name]
    assert isinstance(loaded[name], Path), loaded[name]
    expected = load_file(run.directory / ".penjing" / "probe.safetensors")["logits"]
    with safe_open(loaded[name], "pt") as file:
        logits, odd = file.get_tensor("logits"), json.loads(file.metadata()["found"])
    assert odd == {"missing_keys": [], "unexpected_keys": []}
    torch.testing.assert_close(logits[-len(expected) :], expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))
    assert expected.std() > 0.1


@pytest.mark.parametrize("name", CASES)
def test_the_report_tells_what_was_done(name: str, written) -> None:
    run = written[name]
    report = run.report
    assert read_report(run.directory).as_dict() == report.as_dict()
    assert report.verification["passed"] and report.verification["difference"] <= TOLERANCE
    assert report.quality is not None and report.protocol is not None
    assert math.isfinite(report.quality.kl) and report.quality.kl >= 0
    assert report.quality.reference_perplexity > 1
    written_bytes = sum(row.bytes for row in report.modules)
    if run.case.exact:
        assert [row.bytes for row in report.modules] == [row.predicted_bytes for row in report.modules]
        assert report.predicted_bytes == written_bytes
    headers = report.bytes - written_bytes
    assert 0 < headers < 2_000 + 150 * report.verification["tensors"]
    for row in report.modules:
        assert (row.error is None) == (row.scheme == "dense" or not row.steps), row
        assert row.error is None or 0 <= row.error < 1.5, row
    assert len(report.block_errors) == json_config(run)["blocks"]


def json_config(run: Run) -> dict[str, Any]:
    inspected = api.inspect(run.directory)
    return {"blocks": inspected.layout.blocks, "tied": inspected.layout.tied}


def test_every_method_has_a_case() -> None:
    decoders = {name for name, method in METHODS.items() if method.reads == "decoder"}
    assert {step["method"] for case in CASES.values() for step in case.steps} == decoders
    assert {case.family for case in CASES.values()} >= set(FAMILIES)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("tied")])
def test_tied_stays_tied(name: str, written) -> None:
    run = written[name]
    assert json_config(run)["tied"]
    names = {key for file in run.directory.glob("*.safetensors") for key in load_file(file)}
    assert not any(key.startswith("lm_head") for key in names)


@pytest.mark.parametrize("name", ["gptq", "shortgpt, wanda, gptq", "embedding and head"])
def test_formats_with_codes_agree(name: str, written) -> None:
    """The same recipe gives the same model whatever it is written in.

    Not so with quantised inputs: the native format multiplies integers, the other what they stand for, and where an
    input lies between two codes the last bit of what came before decides.
    """
    probes = [
        load_file(written[f"{name}, {format}"].directory / ".penjing" / "probe.safetensors")["logits"]
        for format in ("compressed-tensors", "native")
    ]
    assert torch.equal(*probes)


@pytest.mark.parametrize("name", ["gptq, compressed-tensors", "shortgpt, wanda, gptq, native"])
@pytest.mark.slow
def test_verify_and_evaluate_by_themselves(name: str, written, short_texts) -> None:
    run = written[name]
    result = api.verify(run.directory)
    assert result.how == "transformers" and result.difference <= TOLERANCE
    measured = api.evaluate(run.directory, against=run.model, **short_texts["evaluation"])
    assert run.report.quality is not None
    assert measured.quality.kl == pytest.approx(run.report.quality.kl, rel=1e-5)
    assert measured.protocol == run.report.protocol


@pytest.mark.parametrize("family", [*FAMILIES, "olmo2"])
def test_a_transform_keeps_the_function(family: str, tiny_model, short_texts, tmp_path) -> None:
    """Scales move between neighbours; with nothing rounded afterwards the logits stay what they were."""
    model = tiny_model("llama", **UNLISTED) if family == "olmo2" else tiny_model(family)
    wanted = recipe(short_texts, step("smoothquant", alpha=0.7), format="dense", dtype="float32")
    compress(model, wanted, tmp_path / "out", evaluated=False)
    before, after = logits_of(model), logits_of(tmp_path / "out")
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4 * float(before.abs().max()))
    old, new = weights_of(model), weights_of(tmp_path / "out")
    moved = [name for name in new if not torch.equal(old[name], new[name])]
    assert any("norm" in name or "ln_" in name for name in moved) == (family not in NO_NORM_BEFORE), moved


def logits_of(directory: Path) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.arange(3, 43).reshape(2, 20), use_cache=False).logits


def weights_of(directory: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in directory.glob("*.safetensors") for key, value in load_file(file).items()}


def test_compressed_tensors_refuses_groups_that_do_not_divide_and_names_some_that_do(tiny_model, short_texts) -> None:
    with pytest.raises(PlanError, match=r"group_size 40 does not divide the 64 inputs of .*; .*32.* do"):
        api.plan(tiny_model("llama"), recipe(short_texts, four("rtn", group_size=40)))


def test_hidden_states_in_a_file_change_nothing(tiny_model, short_texts, tmp_path) -> None:
    wanted = recipe(short_texts, {"method": "gptq", "bits": 4, "group_size": 32})
    compress(tiny_model("llama"), wanted, tmp_path / "memory")
    spilling = wanted | {"calibration": short_texts["calibration"] | {"spill": True}}
    compress(tiny_model("llama"), spilling, tmp_path / "file")
    assert shards(tmp_path / "file") == shards(tmp_path / "memory")
    assert not list((tmp_path / "file" / ".penjing").glob("*.tmp"))


@pytest.mark.parametrize("steps", [[four("gptq")], [four("awq")], [{"method": "wanda", "sparsity": 0.5}, four("gptq")]])
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_matrix_units_of_half_width(family, steps, tiny_model, short_texts, tmp_path) -> None:
    """Where the processor multiplies bf16 matrices, calibration runs in bf16; errors stay what they are in fp32."""
    wanted = recipe(short_texts, *steps, format="native")
    wide = compress(tiny_model(family), wanted, tmp_path / "wide")
    narrow = compress(tiny_model(family), wanted, tmp_path / "narrow", arithmetic=torch.bfloat16)
    assert narrow.calibration.dtype == "bfloat16"
    errors = [(one.error, other.error) for one, other in zip(wide.modules, narrow.modules, strict=True) if one.error]
    assert errors
    for expected, found in errors:
        assert found == pytest.approx(expected, rel=0.25, abs=0.01)
