"""Mixes of types: every tensor gets the type that llama.cpp gives it, and the recipe's words reach it."""

from __future__ import annotations

import ctypes

import pytest
import torch

from penjing import api
from penjing.checkpoint import open_checkpoint
from penjing.checkpoint.gguf_header import read_gguf_header
from penjing.checkpoint.gguf_names import ARCHITECTURES, WRITTEN_AS
from penjing.errors import PlanError, RecipeError
from penjing.formats.gguf.assembly import convert
from penjing.formats.gguf.types import type_of
from penjing.methods.typed_grid import MIXES
from penjing.models import layout_of
from penjing.planning import make_plan
from penjing.recipe import load_recipe
from runs import recipe, texts

pytest.importorskip("gguf")

SHAPES = {
    "llama": {"layers": 16, "hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 2, "inner": 256},
    "qwen2": {"layers": 9, "hidden_size": 64, "tied": False, "inner": 256},
    "phi3": {"layers": 5, "inner": 256},
    "gpt2": {"layers": 5, "inner": 256},
}
THEIRS = {"q2_k_m": "Q2_K"}


def steps(mix: str, **keys: str) -> list[dict[str, object]]:
    return [{"method": "rtn", "targets": ["linear", "embedding"], "type": mix, **keys}]


def types_by_plan(source, mix: str) -> dict[str, str]:
    checkpoint = open_checkpoint(source)
    layout = layout_of(checkpoint.config, checkpoint.specs())
    heads = [] if layout.tied else ["lm_head"]
    wanted = {"steps": [{**steps(mix)[0], "targets": ["linear", "embedding", *heads]}], "format": "gguf"}
    plan = make_plan(checkpoint, layout, load_recipe(wanted))
    names = ARCHITECTURES[WRITTEN_AS[layout.model_type]]
    coded = [row for row in plan.rows if row.scheme.grid is not None]
    return {f"{names.stored_name(row.module.name)}.weight": type_of(row.scheme.grid) for row in coded}


@pytest.mark.parametrize("family", SHAPES)
def test_every_tensor_has_the_type_that_llama_quantize_gives_it(tiny_model, tmp_path, family):
    llama_cpp = pytest.importorskip("llama_cpp")
    source = tiny_model(family, **SHAPES[family])
    checkpoint = open_checkpoint(source)
    dense = convert(checkpoint, layout_of(checkpoint.config, checkpoint.specs()), tmp_path / "dense", torch.float32)
    for mix in MIXES:
        settings = llama_cpp.llama_model_quantize_default_params()
        settings.nthread = 1
        settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{THEIRS.get(mix, mix.upper())}")
        path = tmp_path / f"{mix}.gguf"
        assert llama_cpp.llama_model_quantize(str(dense).encode(), str(path).encode(), ctypes.byref(settings)) == 0
        theirs = {name: tensor.quantization.name for name, tensor in read_gguf_header(path).tensors.items()}
        ours = types_by_plan(source, mix)
        assert ours == {name: kind for name, kind in theirs.items() if name in ours}, mix
        assert {kind for name, kind in theirs.items() if name not in ours} <= {"F32"}


def test_a_run_reports_the_type_of_every_tensor(tiny_model, tmp_path):
    """Blocks removed beforehand do not count: the mix is that of the model that is left."""
    source = tiny_model("llama", layers=6, hidden_size=64, inner=256, tied=True)
    wanted = recipe(
        texts(tmp_path / "text"),
        {"method": "shortgpt", "drop": 2},
        {"method": "gptq", "type": "q4_k_m", "scale_search": "diagonal"},
        {"method": "rtn", "targets": ["embedding"], "type": "q4_k_m"},
        {"method": "e2e-qp", "iterations": 2, "batch_size": 2},
        format="gguf",
    )
    report = api.compress(source, wanted, tmp_path / "out", evaluated=False)
    kinds = {n: t.quantization.name for n, t in read_gguf_header(tmp_path / "out" / "out.gguf").tensors.items()}
    assert [kinds[f"blk.{block}.ffn_down.weight"] for block in range(4)] == ["Q4_K", "Q4_K", "Q6_K", "Q6_K"]
    assert [kinds[f"blk.{block}.attn_v.weight"] for block in range(4)] == ["Q5_0", "Q5_0", "Q8_0", "Q8_0"]
    assert kinds["token_embd.weight"] == "Q8_0"
    notes = {row.name: " ".join(row.notes) for row in report.modules}
    assert "q8_0 instead of q6_k" in notes["model.layers.3.self_attn.v_proj"]
    assert all(row.bytes == row.predicted_bytes for row in report.modules)
    assert report.verification["difference"] < 1e-6


def test_a_fallback_of_ones_own(tiny_model):
    source = tiny_model("llama", hidden_size=64, inner=256)
    plan = api.plan(source, {"steps": steps("q3_k_m", fallback="q4_0"), "format": "gguf"}).as_dict()
    notes = {row["name"]: row["note"] for row in plan["modules"]}
    assert notes["model.layers.0.self_attn.q_proj"].startswith("q4_0 instead of q3_k")


def test_a_refusal_names_formats_that_fit(tiny_model):
    with pytest.raises(PlanError, match=r"format awq cannot hold .*Formats that can: .*gguf, native"):
        api.plan(tiny_model("llama"), {"steps": [{"method": "rtn", "type": "q5_1"}], "format": "awq"})


def test_mixes_belong_to_gguf(tiny_model):
    with pytest.raises(PlanError, match="mix of GGUF's types; use `format: gguf`"):
        api.plan(tiny_model("llama"), {"steps": steps("q4_k_m"), "format": "native"})
    with pytest.raises(RecipeError, match="type q4_k_m fixes `bits: 4`"):
        load_recipe({"steps": [{"method": "rtn", "type": "q4_k_m", "bits": 3}], "format": "gguf"})
