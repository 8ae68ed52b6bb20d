"""Ranks that a walk chooses: the recipe that comes out does what was promised."""

from __future__ import annotations

import pytest

from penjing import api
from penjing.errors import OutputError, PlanError
from penjing.recipe import load_recipe
from runs import compress, recipe, texts

SVD = {"method": "svd-llm", "ratio": 0.6, "multiple": 4}


@pytest.fixture(scope="module")
def short_texts(tmp_path_factory):
    return texts(tmp_path_factory.mktemp("texts"))


@pytest.mark.parametrize("by", ["gradient", "output"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_budget_holds_and_the_recipe_runs(family, by, tiny_model, short_texts, tmp_path):
    model, file = tiny_model(family), tmp_path / "ranks.yaml"
    wanted = recipe(short_texts, SVD, {"method": "rtn", "targets": ["linear"], "group_size": 8}, format="native")
    found = api.ranks(model, wanted, ratio=0.6, by=by, output=file)
    before, after = found.parameters
    assert 0.5 * before < after <= 0.6 * before
    assert load_recipe(file) == found.recipe
    report = compress(model, file, tmp_path / "out")
    for row in report.modules:
        if row.kind == "linear":
            unit = next(name for name in found.chosen if name == row.name or ("*" in name and row.block is not None))
            rank = found.chosen.get(row.name, found.chosen[unit])
            assert row.scheme.startswith("W4" if rank is None else "rank ")
    assert report.predicted_bytes == sum(row.bytes for row in report.modules)
    even = sum(
        one.loss(max(int(0.6 * one.parameters(None) / one.parameters(1)) // 4 * 4, 1)) for one in found.spectra.values()
    )
    assert found.loss <= even


def test_energy_and_what_is_refused(tiny_model, short_texts, tmp_path):
    model = tiny_model("llama")
    wanted = recipe(short_texts, SVD, format="native")
    few, many = (api.ranks(model, wanted, energy=energy) for energy in (0.5, 0.95))
    assert few.parameters[1] < many.parameters[1]
    with pytest.raises(PlanError, match="either a ratio"):
        api.ranks(model, wanted)
    with pytest.raises(PlanError, match="no step of the recipe makes linears low rank"):
        api.ranks(model, recipe(short_texts, {"method": "rtn"}, format="native"), ratio=0.5)
    with pytest.raises(PlanError, match="nothing to do"):
        api.ranks(model, wanted, energy=1.0)
    (tmp_path / "there.yaml").write_text("x")
    with pytest.raises(OutputError, match="not overwritten"):
        api.ranks(model, wanted, ratio=0.5, output=tmp_path / "there.yaml")
