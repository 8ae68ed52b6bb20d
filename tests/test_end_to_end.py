"""One table of cases: compress, write, load in a fresh process as a user would, compare logits, evaluate."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from penjing import api
from penjing.errors import PlanError
from penjing.evaluation.report import Report, read_report
from penjing.formats import FORMATS
from penjing.methods import METHODS
from penjing.pipeline import load_probe
from penjing.pipeline.verification import TOLERANCE
from runs import compress, recipe, shards, texts
from tiny_models import FAMILIES

pytest.importorskip("compressed_tensors")
pytest.importorskip("accelerate")

Step = dict[str, Any]

NO_NORM_BEFORE = ("olmo2",)
"""Families in which no norm feeds a linear, so that nothing can be smoothed."""


@dataclass(frozen=True)
class Case:
    """A recipe on a tiny model. `exact`: the plan can know the bytes, since no step prunes, keeps a fraction or lets
    sizes follow from frequencies."""

    steps: tuple[Step, ...]
    format: str = "compressed-tensors"
    family: str = "llama"
    model: dict[str, Any] = field(default_factory=dict)
    keys: dict[str, Any] = field(default_factory=dict)

    @property
    def exact(self) -> bool:
        return not any(
            "sparsity" in step or "huffman" in step or step.get("outliers", step["method"] == "spqr")
            for step in self.steps
        )


def step(method: str, **keys: Any) -> Step:
    return {"method": method, **keys}


def four(method: str, **keys: Any) -> Step:
    """Four bits in groups of 32, which divide the tiny models' widths."""
    return step(method, **({"bits": 4, "group_size": 32} | keys))


W8A8 = step("rtn", bits=8, group_size="channel", activations={"bits": 8})


BRIEF = {"steps": 2, "batch_size": 2, "micro_batch": 2}
RECOVER = step("recover", rank=4, **BRIEF)
QAT = step("llm-qat", group_size=32, storage="float32", kv=4, pool=2, **BRIEF)


def static(method: str = "rtn", targets: tuple[str, ...] = ("linear",), **keys: Any) -> Step:
    """8-bit weights and inputs whose scales are measured."""
    activations = {"dynamic": False, **keys}
    return step(method, bits=8, group_size="channel", targets=list(targets), activations=activations)


QUANTISED: dict[str, tuple[Step, ...]] = {
    "rtn": (four("rtn"),),
    "rtn 2 bits": (four("rtn", bits=2, group_size=16),),
    "rtn 3 bits": (four("rtn", bits=3),),
    "rtn 5 bits": (four("rtn", bits=5),),
    "rtn 8 bits": (four("rtn", bits=8),),
    "rtn channel": (four("rtn", group_size="channel"),),
    "rtn tensor": (four("rtn", group_size="tensor"),),
    "rtn asymmetric": (four("rtn", symmetric=False),),
    "rtn channel asymmetric": (four("rtn", group_size="channel", symmetric=False),),
    "rtn narrow": (four("rtn", scale_rule="narrow"),),
    "rtn signed-max": (four("rtn", scale_rule="signed-max"),),
    "rtn W8A8": (W8A8,),
    "gptq": (four("gptq"),),
    "gptq natural": (four("gptq", order="natural"),),
    "gptq natural, late groups": (four("gptq", order="natural", static_groups=False),),
    "gptq by group": (four("gptq", order="group-activation", static_groups=False),),
    "gptq tensor": (four("gptq", group_size="tensor"),),
    "gptq asymmetric calibration": (four("gptq", asymmetric=True, targets=["linear", "lm_head"]),),
    "gptq searched": (four("gptq", bits=3, scale_search="gram", order="group-activation", static_groups=False),),
    "rtn searched": (four("rtn", bits=3, scale_search="diagonal", symmetric=False),),
    "smoothquant, gptq asymmetric calibration": (
        step("smoothquant"),
        four("gptq", asymmetric=True, scale_search="diagonal"),
    ),
    "gptq asymmetric 3 bits": (four("gptq", bits=3, symmetric=False),),
    "gptq W8A8": (step("gptq", bits=8, group_size="channel", activations={"bits": 8}),),
    "awq": (four("awq", steps=4),),
    "awq duo, symmetric, unclipped": (four("awq", steps=4, scaling="duo", symmetric=True, clip=False),),
    "autoround": (four("autoround", iterations=3, batch_size=2),),
    "zeroquant": (four("zeroquant", iterations=3, batch_size=2, learning_rate=1e-3),),
    "gptq, e2e-qp": (four("gptq"), step("e2e-qp", iterations=2, batch_size=2)),
    "wanda, autoround": (step("wanda", sparsity=0.3), four("autoround", iterations=2, symmetric=False)),
    "smoothquant, autoround": (step("smoothquant"), four("autoround", iterations=2)),
    "smoothquant, rtn W8A8": (step("smoothquant"), W8A8),
    "smoothquant, gptq": (step("smoothquant", alpha=0.8), four("gptq")),
    "rotation, gptq": (step("rotation"), four("gptq")),
    "shortgpt, rotation, awq": (step("shortgpt", drop=1), step("rotation"), four("awq", steps=2)),
    "two parts": (four("gptq", targets=["*.mlp.*"]), four("rtn", targets=["*.self_attn.*"])),
    "magnitude, gptq": (step("magnitude", sparsity=0.3), four("gptq")),
    "wanda 2:4, gptq": (step("wanda", pattern="2:4"), four("gptq")),
    "sparsegpt with bits": (four("sparsegpt", sparsity=0.4),),
    "sparsegpt 2:4 with bits": (four("sparsegpt", pattern="2:4", symmetric=False),),
    "shortgpt, wanda, gptq": (step("shortgpt", drop=1), step("wanda", sparsity=0.25), four("gptq")),
    "head": (four("gptq", targets=["linear", "lm_head"]),),
    "embedding and head": (four("rtn", targets=["linear", "embedding", "lm_head"]),),
}
"""What both formats with codes can hold; the dense format writes the same values as plain tensors."""

PRUNED: dict[str, tuple[Step, ...]] = {
    "magnitude": (step("magnitude", sparsity=0.5),),
    "magnitude by row": (step("magnitude", sparsity=0.37, scope="row"),),
    "magnitude 2:4": (step("magnitude", pattern="2:4"),),
    "wanda": (step("wanda", sparsity=0.5),),
    "wanda 4:8": (step("wanda", pattern="4:8"),),
    "sparsegpt": (step("sparsegpt", sparsity=0.5),),
    "sparsegpt 2:4": (step("sparsegpt", pattern="2:4"),),
    "wanda refitted": (step("wanda", sparsity=0.5, refit=True),),
    "alps": (step("alps", sparsity=0.5, rounds=9),),
    "shortgpt": (step("shortgpt", drop=2),),
    "smoothquant": (step("smoothquant"),),
    "rotation": (step("rotation"),),
}

ONLY_NATIVE: dict[str, Case] = {
    "llm-int8": Case((step("llm-int8", threshold=2.0),), "native"),
    "llm-int8, gpt2": Case((step("llm-int8", threshold=2.0),), "native", "gpt2"),
    "smoothquant, gptq static asymmetric": Case(
        (step("smoothquant"), static("gptq", symmetric=False, observer="mse")), "native"
    ),
    "static percentile, head": Case(
        (static(targets=("linear", "lm_head"), observer="percentile", percentile=99.9),), "native", "phi3"
    ),
    "static entropy, opt": Case((static(observer="entropy"),), "native", "opt"),
    "W8A8 asymmetric per tensor": Case(
        (W8A8 | {"activations": {"symmetric": False, "granularity": "tensor"}},), "native", "gpt_neox"
    ),
    "fp8 inputs": Case((W8A8 | {"activations": {"type": "fp8"}},), "native"),
    "W4A4": Case((four("rtn", activations={"bits": 4}),), "native"),
    "gptq scattered groups": Case((four("gptq", static_groups=False),), "native"),
    "owq": Case((step("owq", columns=3, group_size=32, symmetric=False),), "native"),
    "owq with a budget": Case((step("owq", bits=4, target_bits=5.5, group_size="channel"),), "native"),
    "owq, gpt2": Case((step("owq", columns=5, group_size=40),), "native", "gpt2"),
    "owq, experts": Case((step("owq", columns=2, group_size=32),), "native", "qwen3_moe"),
    "spqr": Case((step("spqr", outliers=0.02),), "native"),
    "spqr without outliers": Case((step("spqr", outliers=0, order="natural"),), "native"),
    "spqr with a threshold": Case((step("spqr", threshold=0.2, group_size=20, statistic_group=5),), "native", "gpt2"),
    "spqr, experts": Case((step("spqr", order="group-activation"),), "native", "mixtral"),
    "spqr, dense": Case((step("spqr"),), "dense"),
    "hqq": Case((four("hqq"),), "native"),
    "hqq weighted": Case((step("wanda", sparsity=0.3), four("hqq", bits=3, group_size=40, weighted=True)), "native"),
    "smoothquant, hqq": Case((step("smoothquant"), four("hqq", weighted=True)), "native", "gemma2"),
    "bcq": Case((step("bcq", group_size=32),), "native"),
    "bcq offset, gpt2": Case((step("bcq", bits=2, group_size=40, offset=True, turns=1),), "native", "gpt2"),
    "bcq by inputs, experts": Case((step("bcq", group_size="channel", objective="inputs"),), "native", "mixtral"),
    "wanda, bcq": Case((step("wanda", sparsity=0.3), step("bcq", bits=1, group_size=16)), "native", "opt"),
    "bcq uniform": Case((step("bcq", bits=4, levels="uniform", group_size=32, offset=True),), "native", "gpt_neox"),
    "bcq, dense": Case((step("bcq", group_size=32, objective="weights"),), "dense"),
    "svd": Case((step("svd", rank=20),), "native"),
    "svd, head and embedding": Case((step("svd", rank=16, targets=["linear", "embedding", "lm_head"]),), "native"),
    "asvd": Case((step("asvd", ratio=0.7, multiple=1),), "native", "gpt_neox"),
    "svd-llm": Case((step("svd-llm", ratio=0.7),), "native"),
    "svd-llm, bfloat16": Case((step("svd-llm", ratio=0.7),), "native", "qwen2", {"dtype": "bfloat16"}),
    "svd-llm, dense": Case((step("svd-llm", ratio=0.7),), "dense"),
    "svd-llm, gptq": Case((step("svd-llm", ratio=0.7), four("gptq", group_size=16)), "native", "gpt2"),
    "svd, bcq": Case((step("svd", ratio=0.9), step("bcq", group_size="channel", objective="weights")), "native", "opt"),
    "svd-llm, experts, kmeans": Case((step("svd-llm", ratio=0.7), step("kmeans", weighted=False)), "native", "mixtral"),
    "pca": Case((step("pca", ratio=0.7),), "native", "gemma2"),
    "nmf": Case((step("nmf", ratio=0.7, rounds=3),), "native"),
    "nmf split": Case((step("nmf", rank=7, rounds=3, form="split"),), "native", "phi3"),
    "lqer": Case((step("lqer", rank=4, group_size=32),), "native", "qwen3_moe"),
    "lqer on the weights": Case(
        (step("lqer", rank=4, base="rtn", objective="weights", factor_bits=None, rounds=2),), "native", "gpt2"
    ),
    "wanda, lqer": Case((step("wanda", sparsity=0.3), step("lqer", rank=3, group_size=40)), "native"),
    "tensor-train": Case((step("tensor-train", rank=2, targets=["embedding"]),), "native"),
    "tensor-train, tied": Case((step("tensor-train", cores=2, targets=["embedding"]),), "native", "gemma3"),
    "kmeans": Case((step("kmeans", bits=3),), "native"),
    "kmeans compensated, groups": Case((step("kmeans", group_size=24, compensate=True),), "native", "gpt2"),
    "kmeans, embedding": Case((step("kmeans", weighted=False, targets=["linear", "lm_head"]),), "native", "qwen3"),
    "deep compression": Case(
        (step("wanda", sparsity=0.7), step("kmeans", bits=5, group_size="tensor", huffman=True)), "native"
    ),
    "aqlm": Case((step("aqlm", book_bits=4, dimension=4, rounds=1),), "native"),
    "aqlm, experts": Case((step("aqlm", books=1, book_bits=5, dimension=5, rounds=1),), "native", "qwen3_moe"),
    "kmeans huffman, experts": Case((step("kmeans", huffman=True),), "native", "mixtral"),
    "xnor": Case((step("xnor", group_size=32, weighted=True),), "native"),
    "wanda, residual binary, gpt2": Case((step("wanda", sparsity=0.3), step("xnor", order=2)), "native", "gpt2"),
    "onebit, opt": Case((step("onebit"),), "native", "opt"),
    "billm, experts": Case((step("billm", block_size=32),), "native", "mixtral"),
    "ternary": Case((step("ternary", group_size=32),), "native"),
    "magnitude, ternary, phi3": Case(
        (step("magnitude", sparsity=0.3), step("ternary", objective="inputs", group_size="channel")), "native", "phi3"
    ),
    "bitnet, gpt2": Case(
        (step("ternary", rule="absmean", objective="weights", group_size="tensor", activations={"bits": 8}),),
        "native",
        "gpt2",
    ),
    "ternary, dense": Case((step("ternary", group_size=32, objective="weights"),), "dense"),
    "ternary, e2e-qp": Case((step("ternary", group_size=32), step("e2e-qp", iterations=2, batch_size=2)), "native"),
    "groups that do not divide": Case((four("rtn", bits=3, group_size=40, targets=["linear", "embedding"]),), "native"),
    "gptq, groups that do not divide": Case((four("gptq", group_size=40),), "native"),
    "embedding on another grid": Case(
        (four("gptq"), step("rtn", targets=["embedding"], bits=8, group_size="channel")), "native"
    ),
}

TRAINED: dict[str, Case] = {
    "wanda, recover": Case((step("wanda", sparsity=0.5), RECOVER), "native"),
    "wanda, recover, gptq": Case((step("wanda", sparsity=0.5), RECOVER, four("gptq")), "native", "mixtral"),
    "gradual, gptq": Case((step("gradual", sparsity=0.5, steps=4, every=1, batch_size=2), four("gptq")), "native"),
    "lottery ticket": Case((step("lottery-ticket", steps=2, levels=2),), "native", "gpt2"),
    "gptq, peqa": Case((four("gptq"), step("peqa", iterations=2, batch_size=2)), "native"),
    "shortgpt, recover, gptq": Case((step("shortgpt", drop=1), RECOVER | {"what": "full"}, four("gptq"))),
    "distil, gkd, gptq": Case(
        (step("distil", student={"layers": 1}, **BRIEF), step("gkd", new_tokens=4, **BRIEF), four("gptq")),
        "native",
        "gemma3",
    ),
    "wanda, minillm": Case((step("wanda", sparsity=0.5), step("minillm", new_tokens=4, **BRIEF)), "native"),
    "llm-qat, rtn": Case((QAT, four("rtn", scale_rule="narrow", activations={"bits": 8}))),
}

FLOATS: dict[str, Case] = {
    "rtn fp8, fp8 inputs": Case((step("rtn", type="fp8-e4m3", activations={"type": "fp8"}),)),
    "rtn fp8 tensor, static fp8 inputs": Case(
        (step("rtn", type="fp8-e4m3", group_size="tensor", activations={"type": "fp8", "dynamic": False}),)
    ),
    "rtn W8A8 static": Case((W8A8 | {"activations": {"dynamic": False}},)),
    "rtn W8A8 static asymmetric": Case((W8A8 | {"activations": {"dynamic": False, "symmetric": False}},)),
    "gptq mxfp8": Case((step("gptq", type="mxfp8", static_groups=False, order="natural"),)),
    "awq mxfp4": Case((step("awq", type="mxfp4", scale_rounding="ceil", steps=2),)),
    "gptq nvfp4": Case((step("gptq", type="nvfp4"),)),
    "gptq nvfp4, bfloat16": Case((step("gptq", type="nvfp4"),), model={"dtype": "bfloat16"}),
    "gptq nf4": Case((step("gptq", type="nf4", group_size=32, double_quant=True),), "bitsandbytes"),
    "wanda, rtn fp4": Case(
        (step("wanda", sparsity=0.3), step("rtn", type="fp4", group_size=32)), "bitsandbytes", "gpt_neox"
    ),
    "gptq fp8 block": Case((step("gptq", type="fp8-e5m2", group_size="block"),), "native", "gpt2"),
    "awq nf4": Case((step("awq", type="nf4", double_quant=True, steps=2),), "native", "gemma2"),
    "rtn nvfp4": Case((step("rtn", type="nvfp4", targets=["linear", "embedding"]),), "native", "mixtral"),
}

CUT: dict[str, Case] = {
    "heads, neurons, gptq": Case(
        (step("heads", sparsity=0.5), step("neurons", sparsity=0.3, multiple=32, score="obs"), four("gptq"))
    ),
    "flap": Case((step("flap", sparsity=0.25, heads=False),), "dense"),
    "llm-pruner, experts": Case((step("llm-pruner", sparsity=0.5),), "dense", "qwen3_moe"),
    "channels, rtn": Case((step("channels", sparsity=0.125), four("rtn", group_size=8)), "native", "phi3"),
    "channels as they are": Case((step("channels", sparsity=0.25, basis="own"),), "dense", "gemma3"),
    "angular-layers, replaceme": Case(
        (step("angular-layers", drop=1), step("replaceme", drop=1)), "dense", "gpt2", {"layers": 4}
    ),
    "greedy-layers": Case((step("greedy-layers", drop=1, windows=1),), "dense", "gemma3", {"layers": 3}),
}
"""Smaller models, which load like any other."""

TIED: dict[str, Case] = {
    f"tied, {name}, {format}": Case(steps, format, model={"tied": True})
    for format in ("compressed-tensors", "native")
    for name, steps in {
        "linears": (four("gptq"),),
        "embedding": (four("rtn", targets=["linear", "lm_head"]),),
    }.items()
}

IN_TRANSFORMERS = [name for name in FORMATS if name not in ("gptq", "gptq-v2", "awq", "onnx")]
"""Formats that transformers loads without an engine's package; the others have whole runs in tests/formats."""

UNLISTED = {"model_type": "olmo2"}
"""A decoder without a family file: its layout is inferred."""

_IN_FAMILY = {
    "gptq": (four("gptq"),),
    "svd-llm, gptq": (step("svd-llm", ratio=0.7), four("gptq")),
    "awq": (four("awq", steps=2),),
    "autoround": (four("autoround", iterations=2),),
    "smoothquant, W8A8": (step("smoothquant"), W8A8),
    "rotated heads, gptq": (step("rotation", residual=False), four("gptq")),
}


def _families() -> dict[str, Case]:
    cases = {}
    for family in FAMILIES:
        experts = family in ("mixtral", "qwen3_moe")
        for name, steps in _IN_FAMILY.items():
            if experts and "W8A8" in name:
                steps = (step("smoothquant"), four("rtn"))
            cases[f"{family}, {name}, native"] = Case(steps, "native", family)
        if family != "gpt2":
            cases[f"{family}, gptq, compressed-tensors"] = Case((four("gptq"),), "compressed-tensors", family)
        cases[f"{family}, magnitude, dense"] = Case((step("magnitude", sparsity=0.5),), "dense", family)
    cases["inferred, gptq, compressed-tensors"] = Case((four("gptq"),), model=UNLISTED)
    cases["inferred, shortgpt, native"] = Case((step("shortgpt", drop=1), four("rtn")), "native", model=UNLISTED)
    cases["gemma3, shortgpt, dense"] = Case((step("shortgpt", drop=1),), "dense", "gemma3", {"layers": 3})
    cases["qwen3_moe, shortgpt, native"] = Case((step("shortgpt", drop=1), four("gptq")), "native", "qwen3_moe")
    return cases


def _llama() -> dict[str, Case]:
    cases = {}
    for name, steps in QUANTISED.items():
        cases[f"{name}, compressed-tensors"] = Case(steps)
        cases[f"{name}, native"] = Case(steps, "native")
    for name, steps in PRUNED.items():
        cases |= {f"{name}, {format}": Case(steps, format) for format in IN_TRANSFORMERS}
    cases["rtn 3 bits, dense"] = Case(QUANTISED["rtn 3 bits"], "dense")
    cases["untied, rotation, gptq"] = Case(QUANTISED["rotation, gptq"], "native", model={"tied": True})
    cases["gptq, original inputs"] = Case(QUANTISED["gptq"], keys={"propagate": "original"})
    cases["gptq, bfloat16"] = Case(QUANTISED["gptq"], "native", model={"dtype": "bfloat16"})
    cases["gptq, float16, compressed-tensors"] = Case(QUANTISED["gptq"], keys={"dtype": "float16"})
    return cases


CASES: dict[str, Case] = {**_llama(), **ONLY_NATIVE, **FLOATS, **CUT, **TRAINED, **TIED, **_families()}


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


@pytest.fixture(scope="module")
def written(tiny_model, short_texts, tmp_path_factory) -> dict[str, Run | Exception]:
    folder = tmp_path_factory.mktemp("runs")
    done: dict[str, Run | Exception] = {}
    for number, (name, case) in enumerate(CASES.items()):
        model = tiny_model(case.family, **({"layers": 4} if "shortgpt" in name else {}) | case.model)
        wanted = recipe(short_texts, *case.steps, format=case.format, **case.keys)
        try:
            report = compress(model, wanted, folder / str(number))
            done[name] = Run(case, model, folder / str(number), report)
        except Exception as error:
            done[name] = error
    return done


def run_of(written: dict[str, Run | Exception], name: str) -> Run:
    run = written[name]
    if isinstance(run, Exception):
        raise run
    return run


@pytest.fixture(scope="module")
def loaded(written, tmp_path_factory) -> dict[str, Any]:
    """Case -> logits that a fresh process got, or why it failed. Only the native format needs penjing there."""
    found: dict[str, Any] = {}
    for native in (False, True):
        runs = {
            name: run
            for name, run in written.items()
            if not isinstance(run, Exception) and (run.case.format == "native") == native
        }
        output = tmp_path_factory.mktemp("loaded")
        command = [sys.executable, str(Path(__file__).with_name("load_runs.py")), load_probe.__file__, str(output)]
        command += [str(run.directory) for run in runs.values()] + (["--import", "penjing"] if native else [])
        subprocess.run(command, check=True, capture_output=True, env=os.environ)
        told = json.loads((output / "told.json").read_text())
        assert told["imported"] == native
        for number, (name, run) in enumerate(runs.items()):
            found[name] = told["failures"].get(str(run.directory), output / f"{number}.safetensors")
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_process_loads_what_was_in_memory(name: str, written, loaded) -> None:
    run = run_of(written, name)
    assert isinstance(loaded[name], Path), loaded[name]
    expected = load_file(run.directory / ".penjing" / "probe.safetensors")["logits"]
    with safe_open(loaded[name], "pt") as file:
        logits, odd = file.get_tensor("logits"), json.loads(file.metadata()["found"])
    assert odd == {"missing_keys": [], "unexpected_keys": []}
    torch.testing.assert_close(logits[-len(expected) :], expected, rtol=0, atol=TOLERANCE * float(expected.abs().max()))
    assert expected.std() > 0.1


@pytest.mark.parametrize("name", CASES)
def test_the_report_tells_what_was_done(name: str, written) -> None:
    run = run_of(written, name)
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
    assert {step["method"] for case in CASES.values() for step in case.steps} == set(METHODS)
    assert {case.family for case in CASES.values()} >= set(FAMILIES)


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("tied")])
def test_tied_stays_tied(name: str, written) -> None:
    run = run_of(written, name)
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
        load_file(run_of(written, f"{name}, {format}").directory / ".penjing" / "probe.safetensors")["logits"]
        for format in ("compressed-tensors", "native")
    ]
    assert torch.equal(*probes)


@pytest.mark.parametrize("name", ["gptq, compressed-tensors", "shortgpt, wanda, gptq, native"])
@pytest.mark.slow
def test_verify_and_evaluate_by_themselves(name: str, written, short_texts) -> None:
    run = run_of(written, name)
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
