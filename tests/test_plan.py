"""Plan first: a bad recipe costs seconds, because every reason to refuse it is found before a weight is read."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from penjing import api
from penjing.checkpoint.directory import SafetensorsCheckpoint
from penjing.errors import CalibrationError, OutputError, PenjingError, PlanError, RecipeError
from penjing.planning import make_plan
from runs import compress, recipe, texts


def step(method: str, **keys: Any) -> dict[str, Any]:
    return {"method": method, **keys}


GPTQ, RTN, WANDA = step("gptq", group_size=32), step("rtn", group_size=32), step("wanda", sparsity=0.5)
W8A8 = step("rtn", bits=8, group_size="channel", activations={"bits": 8})

BAD: dict[str, tuple[type[PenjingError], str, list[dict[str, Any]], dict[str, Any]]] = {
    "method": (RecipeError, r"unknown method 'gtpq'; did you mean 'gptq'", [step("gtpq")], {}),
    "no method": (RecipeError, r"step 1 needs a `method`", [{"bits": 4}], {}),
    "no steps": (RecipeError, r"steps", [], {}),
    "key": (RecipeError, r"unknown key 'recipe_colour'", [GPTQ], {"recipe_colour": "green"}),
    "key of a step": (
        RecipeError,
        r"\(gptq\): unknown key 'bit'; did you mean 'bits'",
        [step("gptq", bit=4)],
        {},
    ),
    "bits": (RecipeError, r"bits", [step("rtn", bits=9)], {}),
    "format": (RecipeError, r"format", [RTN], {"format": "gguf2"}),
    "version": (RecipeError, r"version", [RTN], {"version": 7}),
    "static tokens": (
        RecipeError,
        r"static inputs have one scale for all tokens",
        [W8A8 | {"activations": {"dynamic": False, "granularity": "token"}}],
        {},
    ),
    "dynamic observer": (
        RecipeError,
        r"`observer: mse` needs dynamic: false",
        [W8A8 | {"activations": {"observer": "mse"}}],
        {},
    ),
    "fp8 of 4 bits": (RecipeError, r"fp8 inputs have 8 bits", [W8A8 | {"activations": {"type": "fp8", "bits": 4}}], {}),
    "static threshold": (
        RecipeError,
        r"`threshold` goes with dynamic",
        [W8A8 | {"activations": {"dynamic": False, "threshold": 6.0}}],
        {},
    ),
    "llm-int8 with activations": (
        PlanError,
        r"the method says itself how inputs are rounded",
        [step("llm-int8", activations={})],
        {"format": "native"},
    ),
    "both kinds of sparsity": (RecipeError, r"either `sparsity`", [step("wanda", sparsity=0.5, pattern="2:4")], {}),
    "pattern that is none": (RecipeError, r"0 < N < M", [step("wanda", pattern="4:2")], {}),
    "pattern against the row": (
        PlanError,
        r"64 inputs .* not a multiple of the 5",
        [step("wanda", pattern="2:5")],
        {},
    ),
    "target": (PlanError, r"targets: '\*\.q_porj' matches no module", [step("rtn", targets=["*.q_porj"])], {}),
    "ignored target": (PlanError, r"ignore: 'lm_haed' matches no module", [RTN | {"ignore": ["lm_haed"]}], {}),
    "nothing left": (PlanError, r"applies to no module", [RTN | {"ignore": ["linear"]}], {}),
    "group": (PlanError, r"group_size 48 does not divide the 64 inputs", [step("rtn", group_size=48)], {}),
    "scattered groups": (PlanError, r"group index", [step("gptq", group_size=32, static_groups=False)], {}),
    "pruned, then owq": (
        PlanError,
        r"step 2 \(owq\) on model\.layers\.0\.\S+: owq keeps whole columns and would fill what an earlier step pruned",
        [WANDA, step("owq", columns=2)],
        {"format": "native"},
    ),
    "owq without room": (
        PlanError,
        r"on model\.layers\.0\.\S+: target_bits 3\.01 has no room for a dense column",
        [step("owq", target_bits=3.01)],
        {"format": "native"},
    ),
    "owq elsewhere": (PlanError, r"use format native", [step("owq", columns=2, group_size=32)], {}),
    "spqr elsewhere": (PlanError, r"use format native", [step("spqr")], {}),
    "twice quantised": (PlanError, r"already quantised", [RTN, GPTQ], {}),
    "pruned after quantising": (PlanError, r"prune before quantising", [RTN, WANDA], {}),
    "smoothed after pruning": (PlanError, r"must be the first to touch", [WANDA, step("smoothquant"), W8A8], {}),
    "rotated too late": (PlanError, r"step 2 \(rotation\) .* make it the first", [WANDA, step("rotation")], {}),
    "rotated twice": (PlanError, r"make it the first", [step("rotation"), step("rotation")], {}),
    "blocks removed after a rotation": (PlanError, r"move it before", [step("rotation"), step("shortgpt", drop=1)], {}),
    "a rotation of some modules": (RecipeError, r"unknown key 'targets'", [step("rotation", targets=["linear"])], {}),
    "nothing to rotate": (RecipeError, r"nothing to rotate", [step("rotation", residual=False, heads=False)], {}),
    "blocks removed too late": (PlanError, r"move it before", [WANDA, step("shortgpt", drop=1)], {}),
    "all blocks removed": (PlanError, r"removes 2 of 2 blocks", [step("shortgpt", drop=2)], {}),
    "all blocks removed in two steps": (PlanError, r"2 of 2", [step("shortgpt", drop=1), step("shortgpt", drop=1)], {}),
    "embedding with a method that looks": (PlanError, r"embedding has none", [GPTQ | {"targets": ["embedding"]}], {}),
    "comparing the dense model with itself": (
        PlanError,
        r"they are the same; drop `propagate` or `asymmetric`",
        [GPTQ | {"asymmetric": True}],
        {"propagate": "original"},
    ),
    "float zero points in integer kernels": (PlanError, r"not whole numbers", [step("hqq", group_size=32)], {}),
    "scales of no integers searched": (
        RecipeError,
        r"looks for scales of integers",
        [step("rtn", type="nf4", scale_search="gram")],
        {},
    ),
    "activations without weights": (
        PlanError,
        r"`activations` belongs to the step that quantises",
        [step("smoothquant", activations={"bits": 8})],
        {},
    ),
    "activations of pruned weights": (PlanError, r"only together with its weight", [WANDA | {"activations": {}}], {}),
    "activations in plain tensors": (PlanError, r"plain tensors cannot say", [W8A8], {"format": "dense"}),
    "fused linears apart": (
        PlanError,
        r"engines merge these linears",
        [RTN | {"targets": ["*.q_proj"]}, RTN | {"targets": ["*.k_proj", "*.v_proj"], "bits": 8}],
        {},
    ),
    "mix that the loader cannot read": (
        PlanError,
        r"only in a model with one scheme",
        [RTN, step("rtn", bits=8, group_size=32, targets=["embedding"])],
        {},
    ),
}
"""What is wrong -> error, words, steps, other keys."""


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint whose weights must not be touched."""

    def load(self: object, name: str) -> None:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(SafetensorsCheckpoint, "load", load)


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize("name", BAD)
def test_a_bad_recipe_is_refused_before_a_weight_is_read(name: str, tiny_model, tmp_path) -> None:
    error, words, steps, keys = BAD[name]
    wanted = recipe(texts(tmp_path / "texts"), *steps, **keys)
    with pytest.raises(error, match=words):
        api.plan(tiny_model("llama"), wanted)
    with pytest.raises(error, match=words):
        api.compress(tiny_model("llama"), wanted, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize(
    ("error", "words", "changed"),
    [
        (CalibrationError, r"tokens found, .* needed for 4000 windows", {"samples": 4000}),
        (CalibrationError, r"longer than the 512 positions", {"length": 513}),
        (CalibrationError, r"no such file", {"data": "./nowhere.txt"}),
    ],
)
def test_bad_text_is_refused_before_a_weight_is_read(error, words, changed, tiny_model, tmp_path) -> None:
    wanted = recipe(texts(tmp_path / "texts"), GPTQ)
    with pytest.raises(error, match=words):
        api.compress(tiny_model("llama"), wanted | {"calibration": wanted["calibration"] | changed}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("unreadable")
def test_a_model_is_not_measured_on_what_it_was_calibrated_on(tiny_model, tmp_path) -> None:
    wanted = recipe(texts(tmp_path / "texts"), GPTQ)
    wanted["evaluation"]["data"] = wanted["calibration"]["data"]
    with pytest.raises(PlanError, match="the same"):
        api.compress(tiny_model("llama"), wanted, tmp_path / "out")


@pytest.mark.usefixtures("unreadable")
def test_limits_need_a_measurement(tiny_model, tmp_path) -> None:
    wanted = recipe(texts(tmp_path / "texts"), RTN, require={"max_kl": 0.1})
    with pytest.raises(PlanError, match="has to be measured"):
        api.compress(tiny_model("llama"), wanted, tmp_path / "out", evaluated=False)


@pytest.mark.usefixtures("unreadable")
def test_a_directory_with_other_contents_is_refused_before_a_weight_is_read(tiny_model, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="not an unfinished run"):
        api.compress(tiny_model("llama"), recipe(texts(tmp_path / "texts"), RTN), tmp_path / "out")


@pytest.mark.usefixtures("unreadable")
def test_experts_and_routers(tiny_model, tmp_path) -> None:
    short = texts(tmp_path / "texts")
    with pytest.raises(PlanError, match=r"gate must not be compressed"):
        api.plan(tiny_model("mixtral"), recipe(short, RTN | {"targets": ["*.gate"]}))
    with pytest.raises(PlanError, match=r"experts only with symmetric"):
        api.plan(tiny_model("mixtral"), recipe(short, RTN | {"symmetric": False}))


def test_what_a_format_cannot_hold_stays_dense_only_when_the_recipe_says_so(tiny_model, tmp_path) -> None:
    model = tiny_model("llama", inner=80)
    wanted = recipe(texts(tmp_path / "texts"), RTN | {"group_size": 64})
    with pytest.raises(PlanError, match="down_proj"):
        api.plan(model, wanted)
    report = compress(model, wanted | {"on_unsupported": "dense"}, tmp_path / "out")
    skipped = {entry.name: entry.reason for entry in report.skipped}
    assert set(skipped) == {f"model.layers.{index}.mlp.down_proj" for index in range(2)}
    assert all("does not divide the 80 inputs" in reason for reason in skipped.values())
    left = {row.name: row for row in report.modules if row.name in skipped}
    assert all(row.scheme == "dense" and "left dense" in row.notes[0] for row in left.values())
    assert all("down_proj" in (tmp_path / "out" / page).read_text() for page in ("report.html", "report.json"))


def test_prediction_is_what_is_written(tiny_model, tmp_path) -> None:
    wanted = recipe(texts(tmp_path / "texts"), GPTQ, format="native")
    predicted = api.plan(tiny_model("llama"), wanted)
    report = compress(tiny_model("llama"), wanted, tmp_path / "out", evaluated=False)
    assert predicted.bytes == sum(row.bytes for row in report.modules)


def test_a_plan_of_a_known_family_imports_no_transformers(tiny_model, tmp_path) -> None:
    model = tiny_model("llama")
    program = (
        "import sys; from penjing.cli import main; code = main(sys.argv[1:]); "
        "assert 'transformers' not in sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", program, "plan", str(model), "-r", "w8a16-rtn"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "q_proj" in done.stdout


def test_a_config_alone_is_enough_for_a_plan(tiny_model, tmp_path) -> None:
    """What is not downloaded yet can be planned: the layout comes from config.json."""
    checkpoint = SafetensorsCheckpoint(tiny_model("llama"))
    from penjing.models import layout_of
    from penjing.recipe import load_recipe

    plan = make_plan(checkpoint, layout_of(checkpoint.config), load_recipe("w8a16-rtn"))
    assert plan.bytes < plan.source_bytes
    assert plan.peak_memory > 0
