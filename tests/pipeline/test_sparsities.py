"""Sparsity per block or linear: the mean is kept exactly, the recipe runs, the rules are the published ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from penjing import api
from penjing.errors import OutputError, PlanError
from penjing.methods.allocation.owl import by_outliers, by_threshold, level, magnitude_counts, outlier_ratio
from runs import compress, recipe, texts


@pytest.fixture
def short(tmp_path: Path) -> dict[str, Any]:
    return texts(tmp_path / "texts")


def test_worked_example() -> None:
    assert by_outliers([0.03, 0.01], [10, 10], 0.7) == pytest.approx([0.62, 0.78])


def test_outlier_ratio_by_hand() -> None:
    weight, squares = torch.tensor([[1.0, -1.0], [1.0, 9.0]]), torch.tensor([1.0, 4.0])
    # scores 1, 2, 1, 18: mean 5.5
    assert outlier_ratio([weight], [squares], above=3) == 0.25
    assert outlier_ratio([weight], [squares], above=4) == 0
    assert outlier_ratio([weight, torch.ones(1, 2)], [squares, squares], above=3) == pytest.approx(1 / 6)


def test_the_mean_is_over_weights_and_holds_at_the_limits() -> None:
    sizes = [1000, 10, 100]
    for wanted in ([0.9, 0.1, 0.5], [0.0, 2.0, -1.0], [0.5, 0.5, 0.5]):
        for mean in (0.0, 0.3, 0.9, 0.985):
            found = level(wanted, sizes, mean)
            assert sum(value * size for value, size in zip(found, sizes, strict=True)) / 1110 == pytest.approx(mean)
            assert all(0 <= value <= 0.99 for value in found)
            assert sorted(range(3), key=wanted.__getitem__) == sorted(range(3), key=lambda at: (found[at], wanted[at]))
    with pytest.raises(ValueError, match=r"mean sparsity of 0\.995"):
        level([0.5], [10], 0.995)


def test_one_threshold_for_all() -> None:
    weights = [torch.randn(64, 64, generator=torch.Generator().manual_seed(seed)) * (seed + 1) for seed in range(3)]
    found = by_threshold([magnitude_counts(weight) for weight in weights], 0.5)
    limit = torch.cat([weight.abs().flatten() for weight in weights]).median()
    for share, weight in zip(found, weights, strict=True):
        assert share == pytest.approx(float((weight.abs() <= limit).double().mean()), abs=0.005)
    assert sum(found) / 3 == pytest.approx(0.5)
    assert by_threshold([magnitude_counts(torch.ones(4, 4))] * 2, 0.25) == pytest.approx([0.25, 0.25])


@pytest.mark.parametrize(
    ("family", "by"),
    [("llama", "owl"), ("gpt2", "owl"), ("mixtral", "owl"), ("qwen2", "magnitude"), ("gpt2", "magnitude")],
)
def test_families(family: str, by: Any, tiny_model: Any, short: dict[str, Any]) -> None:
    wanted = recipe(short, {"method": "wanda", "sparsity": 0.6}, format="native")
    result = api.distribute(tiny_model(family), wanted, by=by, above=3)
    assert result.mean == pytest.approx(0.6, abs=1e-5)
    rows = {row.module.name: row for row in result.plan.rows}
    assert {name: rows[name].scheme.sparsity for name in result.shares} == dict(result.shares)
    assert all(bool(row.steps) == (row.module.kind == "linear") for row in result.plan.rows)
    if by == "owl":
        blocks = {rows[name].module.block: share for name, share in result.shares.items()}
        assert all(share == blocks[rows[name].module.block] for name, share in result.shares.items())
        assert max(blocks.values()) - min(blocks.values()) <= 0.16 + 1e-5


def test_the_recipe_runs_and_other_steps_stay(tiny_model: Any, tmp_path: Path, short: dict[str, Any]) -> None:
    model = tiny_model("llama")
    steps = [{"method": "sparsegpt", "sparsity": 0.5}, {"method": "rtn", "bits": 8, "group_size": 32}]
    result = api.distribute(
        model, recipe(short, *steps, format="native"), by="magnitude", output=tmp_path / "sparse.yaml"
    )
    assert result.recipe.steps[-1].method == "rtn"
    report = compress(model, result.recipe.as_dict(), tmp_path / "out")
    assert sum(row.bytes for row in report.modules) == pytest.approx(result.plan.bytes, rel=0.01)
    with pytest.raises(OutputError, match="exists"):
        api.distribute(model, recipe(short, *steps), output=tmp_path / "sparse.yaml")


def test_refused_with_a_reason(tiny_model: Any, short: dict[str, Any]) -> None:
    with pytest.raises(PlanError, match="no step of the recipe has a `sparsity`"):
        api.distribute(tiny_model("llama"), recipe(short, {"method": "wanda", "pattern": "2:4"}, format="native"))
    with pytest.raises(PlanError, match="removes blocks"):
        steps = [{"method": "shortgpt", "drop": 1}, {"method": "wanda", "sparsity": 0.5}]
        api.distribute(tiny_model("llama"), recipe(short, *steps, format="native"))
    with pytest.raises(PlanError, match=r"mean sparsity of 0\.995"):
        api.distribute(tiny_model("llama"), recipe(short, {"method": "wanda", "sparsity": 0.995}, format="native"))
