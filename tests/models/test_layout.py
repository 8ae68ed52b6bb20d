"""Layouts from config alone: sizes, ties, conditions, and what a wrong checkpoint is told."""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from penjing.checkpoint import TensorSpec, open_checkpoint
from penjing.errors import CheckpointError
from penjing.models import check_tied_head, layout_of
from penjing.models.expressions import holds, size, sizes

LLAMA_70B = {
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
}
GPT2 = {"model_type": "gpt2", "vocab_size": 50257, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_positions": 1024}
MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_local_experts": 8,
}


@pytest.mark.parametrize(
    ("config", "parameters"),
    [(LLAMA_70B, 70_553_706_496), (GPT2, 124_439_808), (MIXTRAL, 46_702_792_704)],
    ids=["llama-3-70b", "gpt2", "mixtral-8x7b"],
)
def test_published_parameter_counts(config, parameters):
    assert layout_of(config).parameters == parameters


def test_a_known_family_needs_neither_torch_nor_transformers():
    script = (
        "import sys, time; from penjing.models import layout_of; start = time.perf_counter();"
        f"layout = layout_of({LLAMA_70B!r}); seconds = time.perf_counter() - start;"
        "assert not {'torch', 'transformers'} & set(sys.modules); assert seconds < 0.5, seconds; print(layout.blocks)"
    )
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert result.stdout.strip() == "80", result.stderr


def test_transposed_modules_show_outputs_first():
    spec = layout_of(GPT2).by_name["transformer.h.3.attn.c_attn"]
    assert spec.transposed
    assert (spec.tensors["weight"], spec.shape) == ((768, 2304), (2304, 768))
    assert spec.tensors["bias"] == (2304,)


def test_tied_head_has_no_tensors():
    tied = layout_of({**LLAMA_70B, "tie_word_embeddings": True})
    assert tied.tied
    assert tied.head.tensors == {}
    assert tied.parameters == 70_553_706_496 - 128256 * 8192


def test_values_and_outputs_are_neighbours_only_with_as_many_heads():
    def source(config):
        return layout_of(config).groups[0][1].source

    assert source(LLAMA_70B) is None
    assert source({**LLAMA_70B, "num_key_value_heads": 64}) == "self_attn.v_proj"
    assert (
        source({key: value for key, value in LLAMA_70B.items() if key != "num_key_value_heads"}) == "self_attn.v_proj"
    )


def test_experts_are_listed_expert_by_expert():
    layout = layout_of(MIXTRAL)
    names = [spec.name.split("experts.")[1] for spec in layout.of_block(0) if "experts" in spec.name]
    assert names[:4] == ["0.w1", "0.w3", "0.w2", "1.w1"]
    group = next(group for group in layout.groups[0] if group.linears[0] == "block_sparse_moe.experts.5.w1")
    assert group.inside == "block_sparse_moe.experts.5"
    assert group.source is None
    assert group.fused


def test_a_missing_size_is_named():
    with pytest.raises(CheckpointError, match="`intermediate_size`"):
        layout_of({key: value for key, value in LLAMA_70B.items() if key != "intermediate_size"})


def test_wrong_checkpoints_are_told_what_is_wrong(tiny_model):
    checkpoint = open_checkpoint(tiny_model("llama"))
    specs = checkpoint.specs()
    layout_of(checkpoint.config, specs)
    name = "model.layers.1.mlp.up_proj.weight"
    with pytest.raises(CheckpointError, match=f"lacks .*{name}"):
        layout_of(checkpoint.config, {key: spec for key, spec in specs.items() if key != name})
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.extra\.weight"):
        layout_of(checkpoint.config, {**specs, "model.layers.0.extra.weight": TensorSpec((2,), "float32", 8)})
    with pytest.raises(CheckpointError, match=rf"{name}' has shape \[96, 32\] but the config implies \[96, 64\]"):
        layout_of(checkpoint.config, {**specs, name: TensorSpec((96, 32), "float32", 12288)})


def test_leftovers_of_old_checkpoints_are_passed_over(tiny_model):
    mask = TensorSpec((1, 1, 8, 8), "uint8", 64)
    for family, leftover in (
        ("gpt2", "transformer.h.0.attn.bias"),
        ("gpt2", "transformer.h.1.attn.masked_bias"),
        ("gpt2", "lm_head.weight"),
        ("gpt_neox", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"),
        ("llama", "model.layers.1.self_attn.rotary_emb.inv_freq"),
    ):
        checkpoint = open_checkpoint(tiny_model(family))
        layout_of(checkpoint.config, {**checkpoint.specs(), leftover: mask})


def test_a_head_stored_beside_the_embedding_it_is_tied_to_must_equal_it(tiny_model, tmp_path):
    path = shutil.copytree(tiny_model("llama", tied=True), tmp_path / "model")
    tensors = load_file(path / "model.safetensors")
    for change, fits in ((0.0, True), (0.5, False)):
        head = tensors["model.embed_tokens.weight"].clone()
        head[7, 7] += change
        save_file({**tensors, "lm_head.weight": head}, path / "model.safetensors")
        checkpoint = open_checkpoint(path)
        layout = layout_of(checkpoint.config, checkpoint.specs())
        if fits:
            check_tied_head(layout, checkpoint)
        else:
            with pytest.raises(CheckpointError, match=r"'lm_head\.weight' and 'model\.embed_tokens\.weight' differ"):
                check_tied_head(layout, checkpoint)


def test_unknown_decoders_are_inferred():
    config = {
        "model_type": "stablelm",
        "vocab_size": 96,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    layout = layout_of(config)
    assert (layout.family, layout.block_path, layout.blocks) == ("inferred", "model.layers", 3)
    assert layout.by_name["model.layers.2.mlp.down_proj"].shape == (32, 48)
    assert layout.embedding.name == "model.embed_tokens"
    assert [spec.name for spec in layout.modules[-2:]] == ["model.norm", "lm_head"]
    assert {(group.source, group.linears) for group in layout.groups[0]} >= {(None, ("self_attn.q_proj",))}


def test_inferred_agrees_with_the_family_file(tiny_model):
    from penjing.models.inferred import inferred_layout

    for family in ("llama", "gpt2", "opt", "gemma3"):
        config = open_checkpoint(tiny_model(family)).config
        known, inferred = layout_of(config), inferred_layout(config)
        assert {spec.name: spec for spec in known.modules} == {spec.name: spec for spec in inferred.modules}
        assert (known.block_path, known.tied) == (inferred.block_path, inferred.tied)


def test_encoders_and_unknown_types_are_refused():
    with pytest.raises(CheckpointError, match="'no_such_model'"):
        layout_of({"model_type": "no_such_model"})


def test_expressions():
    values = {"a": 3, "b": 4, "kind": "relu", "none": None}
    assert size("a * b + 2 * a", values) == 18
    assert size("b // 2 - 1", values) == 1
    assert size("b - a - 1", values) == 0
    assert sizes("a, a * b", values) == (3, 12)
    assert holds("a != b", values)
    assert not holds("a == b", values)
    assert holds("kind == relu", values)
    assert holds("!missing", values)
    assert not holds("none", values)
    with pytest.raises(CheckpointError, match="`c` must be a size"):
        size("a * c", values)
