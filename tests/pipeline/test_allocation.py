"""Bits under a budget, end to end: never over it, siblings together, a recipe that `compress` takes as it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from penjing import api
from penjing.checkpoint.directory import SafetensorsCheckpoint
from penjing.errors import OutputError, PlanError
from penjing.pipeline.allocation import read_bytes
from penjing.pipeline.choices import Choice, read_choices
from runs import compress, penjing, recipe, texts
from tiny_models import FAMILIES

RTN: dict[str, Any] = {"method": "rtn", "group_size": 32}
GPTQ: dict[str, Any] = {"method": "gptq", "group_size": 32}


@pytest.fixture
def short(tmp_path: Path) -> dict[str, Any]:
    return texts(tmp_path / "texts")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, tiny_model: Any, tmp_path: Path, short: dict[str, Any]) -> None:
    wanted = recipe(short, RTN, format="native")
    result = api.allocate(tiny_model(family), wanted, bits=5, choices="2,3,4,8,dense", output=tmp_path / "mixed.yaml")
    plan = api.plan(tiny_model(family), tmp_path / "mixed.yaml")
    assert plan.bytes == result.plan.bytes <= result.budget
    assert result.bits <= 5
    rows = {row.module.name: row for row in plan.rows}
    for share in result.shares:
        choice = result.choices[share.chosen]
        grids = {rows[name].scheme.grid for name in share.modules}
        assert len(grids) == 1
        grid = grids.pop()
        assert (None if grid is None else grid.bits) == choice.bits
        assert sum(rows[name].bytes for name in share.modules) == share.bytes[share.chosen]
    allocated = [name for share in result.shares for name in share.modules]
    assert sorted(allocated) == sorted(row.module.name for row in plan.rows if row.module.kind == "linear")
    assert len({share.chosen for share in result.shares}) > 1


def test_siblings_share(tiny_model: Any, short: dict[str, Any]) -> None:
    result = api.allocate(tiny_model("llama"), recipe(short, RTN), bits=4, by="output")
    ends = {tuple(name.rpartition(".")[2] for name in share.modules) for share in result.shares}
    assert ends == {("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)}


@pytest.mark.parametrize(("form", "units"), [("native", 2 * 2), ("compressed-tensors", 1)])
def test_experts_share_as_far_as_the_format_wants(
    form: str, units: int, tiny_model: Any, short: dict[str, Any]
) -> None:
    result = api.allocate(tiny_model("mixtral"), recipe(short, RTN, format=form), bits=5, choices="2,3,4,8")
    experts = [share for share in result.shares if ".experts." in share.modules[0]]
    assert len(experts) == units
    assert result.plan.bytes <= result.budget


@pytest.mark.parametrize("by", ["output", "gradient", "kl"])
def test_a_larger_budget_never_loses_more(by: Any, tiny_model: Any, short: dict[str, Any]) -> None:
    wanted = recipe(short, RTN, format="native")
    results = [api.allocate(tiny_model("llama"), wanted, bits=bits, by=by) for bits in (3.3, 3.7, 4.5, 6)]
    losses = [result.loss for result in results]
    if by == "kl":  # what is measured is the choice that would fit everywhere, which depends on the budget
        losses = [result.loss / result.uniform_loss(0) for result in results]
    assert losses == sorted(losses, reverse=True)
    for result in results:
        fitting = [number for number, size in enumerate(result.uniform) if size <= result.budget]
        assert all(result.loss <= result.uniform_loss(number) for number in fitting)


def test_compress_takes_the_recipe_and_meets_the_budget(tiny_model: Any, tmp_path: Path, short: dict[str, Any]) -> None:
    model = tiny_model("llama")
    budget = api.plan(model, recipe(short, GPTQ | {"bits": 3}, format="native")).bytes
    result = api.allocate(model, recipe(short, GPTQ, format="native"), budget=budget)
    report = compress(model, result.recipe.as_dict(), tmp_path / "out")
    assert sum(row.bytes for row in report.modules) == result.plan.bytes <= budget
    assert len({row.bits for row in report.modules if row.kind == "linear"}) > 1


def test_other_steps_stay(tiny_model: Any, short: dict[str, Any]) -> None:
    """A pruning step before and a step for the embedding are not up for choice, but are paid for."""
    steps = [
        {"method": "magnitude", "sparsity": 0.3},
        RTN,
        {"method": "rtn", "bits": 8, "group_size": 32, "targets": ["embedding"]},
    ]
    result = api.allocate(tiny_model("llama"), recipe(short, *steps, format="native"), bits=4, choices="2,4,dense")
    assert result.plan.bytes <= result.budget
    rows = {row.module.kind: row for row in result.plan.rows}
    assert rows["embedding"].scheme.grid.bits == 8  # type: ignore[union-attr]
    assert rows["linear"].scheme.sparsity == 0.3


def test_a_rotated_model(tiny_model: Any, short: dict[str, Any]) -> None:
    """What is measured is the model that will be rounded, with its head untied."""
    wanted = recipe(short, {"method": "rotation"}, RTN, format="native")
    result = api.allocate(tiny_model("llama", tied=True), wanted, bits=4)
    assert result.recipe.steps[0].method == "rotation"
    assert result.plan.bytes <= result.budget
    plain = api.allocate(tiny_model("llama", tied=True), recipe(short, RTN, format="native"), bits=4)
    assert result.loss != plain.loss


def test_group_sizes_are_choices(tiny_model: Any, short: dict[str, Any]) -> None:
    result = api.allocate(
        tiny_model("llama"), recipe(short, RTN, format="native"), bits=4.4, choices="2g16,3g64,4g32,5"
    )
    sizes = {row.scheme.grid.group_size for row in result.plan.rows if row.scheme.grid}
    assert sizes <= {16, 64, 32} and len(sizes) > 1


BAD: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "nothing fits": (
        r"1,000 bytes is too small: with the smallest choices .* takes [\d,]+ bytes",
        {},
        {"budget": 1000},
    ),
    "too few bits": (r"too small: .* bits per weight", {}, {"bits": 1.5}),
    "unit": (r"unknown unit 'MX' in the budget '80MX'; known: B, kB", {}, {"budget": "80MX"}),
    "no size": (r"'eighty' is no size", {}, {"budget": "eighty"}),
    "no budget": (r"either in bytes .* or in bits", {}, {}),
    "two budgets": (r"either in bytes .* or in bits", {}, {"budget": 10**6, "bits": 4}),
    "one choice": (r"two or more choices", {}, {"bits": 4, "choices": "4"}),
    "choice that is none": (r"choice 'four' is neither bits", {}, {"bits": 4, "choices": "3,four"}),
    "bits out of range": (r"bits.*less than or equal to 8", {}, {"bits": 4, "choices": "3,9"}),
    "group that does not divide": (r"group_size 48 does not divide the 64", {}, {"bits": 4, "choices": "3,4g48"}),
    "mixture that cannot be read": (
        r"cannot hold a mixture of these choices: .*packed zero points",
        {"steps": [RTN | {"symmetric": False}]},
        {"bits": 4},
    ),
    "no bits to choose": (
        r"no step of the recipe has `bits`",
        {"steps": [{"method": "magnitude", "sparsity": 0.5}]},
        {"bits": 4},
    ),
    "blocks removed": (r"removes blocks", {"steps": [{"method": "shortgpt", "drop": 1}, RTN]}, {"bits": 4}),
    "everything fits": (r"every linear fits in", {}, {"budget": "1GB", "choices": "4,dense"}),
}
"""Words of the message, changes of the recipe, arguments."""


@pytest.mark.parametrize("name", BAD)
def test_refused_with_a_reason(
    name: str, tiny_model: Any, tmp_path: Path, short: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    words, changes, arguments = BAD[name]
    if name != "everything fits":

        def load(self: object, tensor: str) -> None:
            raise AssertionError(f"{tensor} was read")

        monkeypatch.setattr(SafetensorsCheckpoint, "load", load)
    with pytest.raises(PlanError, match=words):
        api.allocate(tiny_model("llama"), recipe(short, RTN) | changes, output=tmp_path / "r.yaml", **arguments)
    assert not (tmp_path / "r.yaml").exists()


def test_no_file_is_overwritten(tiny_model: Any, tmp_path: Path, short: dict[str, Any]) -> None:
    (tmp_path / "mine.yaml").write_text("version: 1")
    with pytest.raises(OutputError, match="exists"):
        api.allocate(tiny_model("llama"), recipe(short, RTN), bits=4, output=tmp_path / "mine.yaml")


@pytest.mark.parametrize(
    ("words", "size"),
    [("80MB", 80 * 10**6), ("1.5 GiB", 3 * 2**29), ("12", 12), ("7 kb", 7000), (5, 5), ("2.5e", None), ("-3MB", None)],
)
def test_sizes(words: Any, size: int | None) -> None:
    if size is None:
        with pytest.raises(PlanError):
            read_bytes(words)
    else:
        assert read_bytes(words) == size


def test_choices_are_read_once_each() -> None:
    assert read_choices("3, 4g32,dense,3") == (Choice(3), Choice(4, 32), Choice(None))
    assert [str(choice) for choice in read_choices("3,4g32,dense")] == ["3", "4g32", "dense"]


@pytest.mark.slow
@pytest.mark.demo
def test_the_demo_model_on_the_command_line(tmp_path: Path, short: dict[str, Any]) -> None:
    """2 bits everywhere lose far more than a mixture of 2 and 4 bits that takes 3.3."""
    arguments = ["-r", "w4a16-rtn", "--format", "native", "--samples", 4, "--length", 128, "--choices", "2,4"]
    done = penjing("allocate", "demo", *arguments, "--bits", 3.3, "-o", tmp_path / "mixed.yaml", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["predicted_bytes"] <= result["budget"]
    assert result["predicted_loss"] < min(row["loss"] for row in result["uniform"] if row["fits"])
    planned = penjing("plan", "demo", "-r", tmp_path / "mixed.yaml", "--json")
    assert json.loads(planned.stdout)["predicted_bytes"] == result["predicted_bytes"]
