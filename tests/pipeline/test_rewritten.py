"""A rotated model is the same function: through Penjing's own forward pass, and written and loaded by transformers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from penjing import api
from penjing.checkpoint import open_checkpoint
from penjing.checkpoint.base import Checkpoint
from penjing.errors import PlanError
from penjing.methods.quantization.rotation import RotationOptions, rewrite
from penjing.models import layout_of
from penjing.models.layout import Layout
from penjing.pipeline.rewritten import RewrittenCheckpoint
from penjing.pipeline.stream import StreamedModel
from penjing.pipeline.weights import Weights
from runs import compress, recipe, shards, texts
from tiny_models import FAMILIES, token_windows

FIXED = ("gemma2", "gemma3", "gpt2", "opt", "gpt_neox")
"""Families whose residual stream keeps its basis."""

WHAT = {"stream": {"heads": False}, "heads": {"residual": False}, "both": {}}


def logits(checkpoint: Checkpoint, layout: Layout) -> torch.Tensor:
    """Of a few random tokens, with fp64 arithmetic inside."""
    stream = StreamedModel(checkpoint.config, layout, Weights(checkpoint, layout).live)
    states = stream.forward(token_windows(1, 20), torch.float64)
    with stream.head(torch.float64) as head:
        return head(states)


@pytest.mark.parametrize("what", WHAT)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_function_stays(family: str, what: str, tiny_model) -> None:
    checkpoint = open_checkpoint(tiny_model(family))
    layout = layout_of(checkpoint.config, checkpoint.specs())
    options = RotationOptions(**WHAT[what])
    if family in FIXED and options.residual:
        with pytest.raises(PlanError, match="cannot be rotated"):
            rewrite(layout, options)
        return
    rewriting = rewrite(layout, options)
    rotated = RewrittenCheckpoint(checkpoint, rewriting, "")
    expected = logits(checkpoint, layout)
    difference = (logits(rotated, rewriting.layout) - expected).abs().max() / expected.abs().max()
    assert difference < 1e-5, "what rounding the rotated weights to fp32 explains"
    assert rewriting.tensors
    for name, tensor in ((name, rotated.load(name)) for name in rewriting.tensors):
        assert tensor.dtype == torch.float32 and torch.isfinite(tensor).all()
        changed = name not in checkpoint.specs() or not torch.equal(tensor, checkpoint.load(name).float())
        assert changed, name


@pytest.mark.parametrize("family", ["qwen2", "opt"])
def test_biases_take_part(family: str, tiny_model) -> None:
    """Leaving the rotated bias of the values out is far from the same function."""
    checkpoint = open_checkpoint(tiny_model(family))
    layout = layout_of(checkpoint.config)
    rewriting = rewrite(layout, RotationOptions(residual=False))
    biases = [name for name in rewriting.tensors if name.endswith("v_proj.bias")]
    assert len(biases) == layout.blocks
    for name in biases:
        del rewriting.tensors[name]
    expected = logits(checkpoint, layout)
    found = logits(RewrittenCheckpoint(checkpoint, rewriting, ""), layout)
    assert (found - expected).abs().max() > 1e-3 * expected.abs().max()


def test_a_view_is_a_checkpoint(tiny_model) -> None:
    original = open_checkpoint(tiny_model("llama", tied=True))
    rewriting = rewrite(layout_of(original.config), RotationOptions())
    view = RewrittenCheckpoint(original, rewriting, "a step")
    assert layout_of(view.config, view.specs()) == rewriting.layout, "its tensors are those its config implies"
    assert original.config["tie_word_embeddings"] and not view.config["tie_word_embeddings"]
    assert "lm_head.weight" in view.specs() and "lm_head.weight" not in original.specs()
    assert all(view.load(name).shape == spec.shape for name, spec in view.specs().items())
    assert dict(view.files()) == dict(original.files())
    assert (view.path, view.label) == (original.path, original.label)
    prints = {view.fingerprint(), original.fingerprint()}
    prints |= {RewrittenCheckpoint(original, rewriting, "another").fingerprint()}
    assert len(prints) == 3


def test_tensors_that_stay_are_the_originals(tiny_model) -> None:
    original = open_checkpoint(tiny_model("qwen3"))
    view = RewrittenCheckpoint(original, rewrite(layout_of(original.config), RotationOptions()), "")
    kept = [name for name in original.specs() if "q_norm" in name or "k_norm" in name]
    assert kept and all(torch.equal(view.load(name), original.load(name)) for name in kept)


@pytest.fixture
def short(tmp_path) -> dict[str, Any]:
    return texts(tmp_path / "texts")


def loaded(directory) -> torch.Tensor:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(token_windows(2, 24), use_cache=False).logits


@pytest.mark.parametrize(
    ("family", "tied"), [("llama", True), ("phi3", False), ("qwen3", True), ("mixtral", False), ("qwen3_moe", True)]
)
def test_a_rotated_dense_model_loads_and_says_the_same(family, tied, tiny_model, short, tmp_path) -> None:
    model = tiny_model(family, tied=tied)
    report = compress(model, recipe(short, {"method": "rotation"}, format="dense"), tmp_path / "out")
    before, after = loaded(model), loaded(tmp_path / "out")
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))
    assert report.quality is not None and abs(report.quality.kl) < 1e-6
    assert not json.loads((tmp_path / "out" / "config.json").read_text()).get("tie_word_embeddings")
    written = {
        name: tensor
        for file in shards(tmp_path / "out")
        if file.endswith(".safetensors")
        for name, tensor in load_file(tmp_path / "out" / file).items()
    }
    assert written["model.norm.weight"].eq(1).all() and "lm_head.weight" in written


def test_heads_alone_keep_the_tie_and_cost_nothing(tiny_model, short, tmp_path) -> None:
    model = tiny_model("gemma3")
    step = {"method": "rotation", "residual": False}
    plan = api.plan(model, recipe(short, step, format="dense"))
    assert plan.bytes == plan.source_bytes and not plan.warnings
    compress(model, recipe(short, step, format="dense"), tmp_path / "out", evaluated=False)
    before, after = loaded(model), loaded(tmp_path / "out")
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5 * float(before.abs().max()))
    assert api.inspect(tmp_path / "out").layout.tied


def test_a_plan_counts_the_head_that_is_untied(tiny_model, short, tmp_path) -> None:
    model = tiny_model("llama", tied=True)
    dense = api.plan(model, recipe(short, {"method": "rotation"}, format="dense"))
    head = 4 * 300 * 64
    assert dense.bytes == dense.source_bytes + head
    assert dense.warnings == (f"lm_head is no longer tied to the embedding: {head:,} bytes more",)
    eight = {"method": "rtn", "bits": 8, "group_size": "channel", "targets": ["linear", "lm_head"]}
    wanted = recipe(short, {"method": "rotation"}, eight, format="native")
    plan = api.plan(model, wanted)
    rows = {row.module.name: row for row in plan.rows}
    assert rows["lm_head"].scheme.grid is not None and rows["model.embed_tokens"].scheme.dense
    report = compress(model, wanted, tmp_path / "out", evaluated=False)
    assert report.predicted_bytes == plan.bytes == sum(row.bytes for row in report.modules)
    assert report.source.bytes == plan.source_bytes


def test_half_precision_is_reached_in_one_step(tiny_model, short, tmp_path) -> None:
    model = tiny_model("llama", dtype="bfloat16")
    compress(model, recipe(short, {"method": "rotation"}, format="dense"), tmp_path / "out", evaluated=False)
    checkpoint = open_checkpoint(model)
    rewriting = rewrite(layout_of(checkpoint.config), RotationOptions())
    written = open_checkpoint(tmp_path / "out")
    for name, make in rewriting.tensors.items():
        assert torch.equal(written.load(name), make(checkpoint.load).bfloat16()), name


def test_blocks_go_first_and_scales_may_move_afterwards(tiny_model, short, tmp_path) -> None:
    steps = [
        {"method": "shortgpt", "drop": 1},
        {"method": "rotation"},
        {"method": "smoothquant", "alpha": 0.6},
        {"method": "gptq", "bits": 8, "group_size": 32},
    ]
    model = tiny_model("llama", layers=4, tied=True)
    report = compress(model, recipe(short, *steps, format="native"), tmp_path / "out")
    without = compress(model, recipe(short, steps[0], steps[3], format="native"), tmp_path / "without")
    assert [entry.name for entry in report.skipped] == [entry.name for entry in without.skipped]
    assert report.quality is not None and without.quality is not None
    assert report.quality.kl == pytest.approx(without.quality.kl, rel=0.05)


def test_the_seed_changes_the_bytes_and_nothing_else_does(tiny_model, short, tmp_path) -> None:
    written = []
    for number, seed in enumerate((0, 0, 1)):
        steps = {"method": "rotation", "seed": seed}, {"method": "rtn", "bits": 4, "group_size": 32}
        compress(tiny_model("llama"), recipe(short, *steps), tmp_path / str(number), evaluated=False)
        written.append(shards(tmp_path / str(number)))
    assert written[0] == written[1] != written[2]
