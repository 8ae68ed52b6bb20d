"""Blocks that share weights, end to end on tiny models: the partner that is there is found, one tensor, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from penjing import api
from penjing.checkpoint import open_checkpoint
from penjing.errors import CheckpointError, PlanError
from penjing.models import layout_of
from penjing.models.sharing import CONFIG_KEY
from runs import compress, recipe, texts

TIE = {"method": "tie", "blocks": 1}
FOUR = {"method": "rtn", "bits": 4, "group_size": 32}


@pytest.fixture(scope="module")
def short(tmp_path_factory: Any) -> dict[str, Any]:
    return texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def twins(tiny_model: Any, tmp_path_factory: Any) -> Path:
    """A model whose last block has the linears of its first, every output of one of them doubled."""
    import shutil

    directory = tmp_path_factory.mktemp("twins") / "model"
    shutil.copytree(tiny_model("llama", layers=4), directory)
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if name.startswith("model.layers.0.") and "proj" in name]:
        factor = 2.0 if "up_proj" in name else 1.0
        tensors[name.replace("layers.0", "layers.3")] = factor * tensors[name]
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    return directory


def test_the_twin_is_found_and_stored_once(twins: Path, short: dict[str, Any], tmp_path: Path) -> None:
    report = compress(twins, recipe(short, TIE, FOUR, format="native"), tmp_path / "out")
    (made,) = report.made
    assert made["shared_blocks"] == {"3": 0} and made["kl"] < 1e-5 and made["errors"]["3"] < 1e-3
    assert report.predicted_bytes == sum(row.bytes for row in report.modules)
    written = open_checkpoint(tmp_path / "out")
    mine = sorted(name for name in written.specs() if name.startswith("model.layers.3.") and "norm" not in name)
    assert len(mine) == 7 and all(name.endswith(".output_scale") for name in mine)
    scale = written.load("model.layers.3.mlp.up_proj.output_scale").float()
    assert (scale - 2).abs().max() < 1e-2
    alone = compress(twins, recipe(short, FOUR, format="native"), tmp_path / "alone")
    assert report.quality is not None and alone.quality is not None
    assert abs(report.quality.kl - alone.quality.kl) < 0.1 * alone.quality.kl


def test_transformers_holds_the_weight_once(twins: Path, short: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    import penjing  # noqa: F401

    wanted = recipe(short, {**TIE, "linears": ["mlp.*"]}, {"method": "svd", "rank": 8}, format="native")
    compress(twins, wanted, tmp_path / "out", evaluated=False)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    shared, owner = model.model.layers[3].mlp.up_proj, model.model.layers[0].mlp.up_proj
    assert shared.owner is owner and shared.output_scale.shape == (96,)
    assert not list(shared.parameters())
    assert model.model.layers[3].self_attn.q_proj.left.shape == (64, 8)
    model.save_pretrained(tmp_path / "dense")
    stored = load_file(tmp_path / "dense" / "model.safetensors")
    assert stored["model.layers.3.mlp.up_proj.weight"].shape == (96, 64)


def test_what_was_pruned_stays_so_and_an_export_is_refused(twins: Path, short: dict[str, Any], tmp_path: Path) -> None:
    steps = [{"method": "wanda", "sparsity": 0.5}, {**TIE, "linears": ["mlp.*"]}, {"method": "kmeans", "bits": 3}]
    report = compress(twins, recipe(short, *steps, format="native"), tmp_path / "out", evaluated=False)
    real = sum(row.bytes for row in report.modules)
    assert abs(report.predicted_bytes - real) < 0.01 * real
    assert "50% sparse" in next(row.scheme for row in report.modules if row.name == "model.layers.0.mlp.up_proj")
    with pytest.raises(PlanError, match="share weights"):
        api.export(tmp_path / "out", "dense", tmp_path / "other")


@pytest.mark.parametrize(
    ("steps", "form", "reason"),
    [
        ([TIE], "dense", "every copy would be written"),
        ([TIE, FOUR], "compressed-tensors", "use format native"),
        ([TIE, TIE], "native", "makes another model"),
        ([TIE, {"method": "rotation"}], "native", "would part them"),
        ([TIE, {**FOUR, "bits": 8, "group_size": "channel", "activations": {"bits": 8}}], "native", "weights only"),
        ([FOUR, TIE], "native", "quantise after it"),
        ([{**TIE, "blocks": 4}], "native", "1 can borrow at most"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    twins: Path, short: dict[str, Any], steps: list[dict[str, Any]], form: str, reason: str
) -> None:
    with pytest.raises(PlanError, match=reason):
        api.plan(twins, recipe(short, *steps, format=form))


def test_a_config_that_shares_what_is_not_there(twins: Path) -> None:
    config = open_checkpoint(twins).config
    up = "model.layers.{}.mlp.up_proj"
    for name, owner, reason in [
        (up.format(1), up.format(2), "not in a block before"),
        (up.format(1), "model.layers.0.mlp.down_proj", "another shape"),
        (up.format(9), up.format(0), "lacks one of them"),
    ]:
        with pytest.raises(CheckpointError, match=reason):
            layout_of(config | {CONFIG_KEY: {"linears": {name: owner}, "scaled": False}})
