"""The live model, filled module by module, against the one transformers loads."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from penjing.checkpoint import open_checkpoint
from penjing.errors import CheckpointError
from penjing.models import build_model, fill, find, layout_of, release
from tiny_models import FAMILIES, token_windows

VARIANTS = [(family, {}) for family in FAMILIES] + [
    ("llama", {"tied": True, "inner": 172}),
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
    ("gemma3", {"hidden_size": 48, "dtype": "bfloat16"}),
    ("gpt2", {"tied": False}),
    ("gpt_neox", {"tied": True}),
    ("opt", {"word_embed_proj_dim": 32}),
    ("opt", {"do_layer_norm_before": False}),
    ("qwen3_moe", {"layers": 3, "decoder_sparse_step": 2}),
    ("qwen3_moe", {"layers": 3, "mlp_only_layers": [1]}),
]
IDS = [f"{family}-{'-'.join(options) or 'plain'}" for family, options in VARIANTS]


def filled(path):
    checkpoint = open_checkpoint(path)
    layout = layout_of(checkpoint.config, checkpoint.specs())
    model = build_model(checkpoint.config, layout)
    for spec in layout.modules:
        names = zip(spec.tensors, spec.tensor_names(), strict=True)
        fill(find(model, spec.name), {key: checkpoint.load(name).float() for key, name in names})
    return model, layout


@pytest.mark.parametrize(("family", "options"), VARIANTS, ids=IDS)
def test_logits_are_those_of_from_pretrained(tiny_model, family, options):
    path = tiny_model(family, **options)
    model, layout = filled(path)
    reference = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokens = token_windows()
    with torch.inference_mode():
        expected, found = reference(tokens).logits, model(tokens).logits
    assert expected.std() > 0.1
    if "moe" in family or family == "mixtral":
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.std()))
    else:
        assert torch.equal(found, expected)
    assert layout.blocks == options.get("layers", 2)


@pytest.mark.parametrize(("family", "options"), VARIANTS, ids=IDS)
def test_layout_and_live_model_agree(tiny_model, family, options):
    checkpoint = open_checkpoint(tiny_model(family, **options))
    layout = layout_of(checkpoint.config, checkpoint.specs())
    model = build_model(checkpoint.config, layout)
    for spec in layout.modules:
        live = find(model, spec.name)
        own = {name: tuple(parameter.shape) for name, parameter in live.named_parameters(recurse=False)}
        if spec.tensors:
            assert own == spec.tensors, spec.name
        assert spec.transposed == isinstance(live, Conv1D)
        assert all(parameter.is_meta for parameter in live.parameters(recurse=False))
    listed = {spec.name for spec in layout.modules}
    owners = {name for name, module in model.named_modules() if list(module.parameters(recurse=False))}
    assert owners <= listed
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)}
    assert linears <= {spec.name for spec in layout.modules if spec.kind in ("linear", "head", "other")}
    assert not [name for name, buffer in model.named_buffers() if buffer.is_meta]


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_name_linears_once_and_sources_that_exist(tiny_model, family):
    checkpoint = open_checkpoint(tiny_model(family))
    layout = layout_of(checkpoint.config)
    for index, groups in enumerate(layout.groups):
        names = {spec.name.removeprefix(f"{layout.block_name(index)}."): spec for spec in layout.of_block(index)}
        linears = [linear for group in groups for linear in group.linears]
        assert sorted(linears) == sorted(name for name, spec in names.items() if spec.kind == "linear")
        block = find(build_model(checkpoint.config, layout), layout.block_name(index))
        for group in groups:
            inside = block.get_submodule(group.inside)
            held = {id(module) for module in inside.modules()}
            assert all(id(block.get_submodule(linear)) in held for linear in group.linears)
            assert len({names[linear].shape[1] for linear in group.linears}) == 1
            if group.source is not None:
                source, width = names[group.source], names[group.linears[0]].shape[1]
                assert source.tensors["weight"][0] == width


def test_never_names_the_routers(tiny_model):
    for family, count in (("mixtral", 2), ("qwen3_moe", 2), ("llama", 0)):
        layout = layout_of(open_checkpoint(tiny_model(family)).config)
        assert len(layout.never) == count
        assert all(layout.by_name[name].kind == "router" for name in layout.never)


def test_release_sends_parameters_and_ties_back(tiny_model):
    model, layout = filled(tiny_model("llama", tied=True))
    embedding, head = find(model, layout.embedding.name), find(model, layout.head.name)
    assert head.weight is embedding.weight
    assert not head.weight.is_meta
    release(embedding)
    assert embedding.weight.is_meta
    assert head.weight.is_meta


def test_fill_refuses_what_does_not_fit(tiny_model):
    checkpoint = open_checkpoint(tiny_model("llama"))
    model = build_model(checkpoint.config, layout_of(checkpoint.config))
    norm = find(model, "model.norm")
    with pytest.raises(CheckpointError, match=r"takes shape \[64\], given \[65\]"):
        fill(norm, {"weight": torch.ones(65)})
    with pytest.raises(CheckpointError, match="no parameter 'bias'"):
        fill(norm, {"bias": torch.ones(64)})
    with pytest.raises(CheckpointError, match=r"no module 'model\.layers\.7'"):
        find(model, "model.layers.7")


def test_a_quantised_config_builds_a_dense_model(tiny_model):
    config = open_checkpoint(tiny_model("llama")).config
    config = {**config, "quantization_config": {"quant_method": "compressed-tensors", "config_groups": {}}}
    layout = layout_of(config, {})
    assert type(find(build_model(config, layout), "model.layers.0.mlp.up_proj")) is nn.Linear


OWN_CONFIG = """
from transformers import LlamaConfig


class OwnConfig(LlamaConfig):
    model_type = "home_made"
"""
OWN_MODEL = """
from transformers import LlamaForCausalLM
from .configuration_own import OwnConfig


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def test_a_model_that_brings_its_own_code(tiny_model, tmp_path, monkeypatch):
    modules = tmp_path / "modules"
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(modules))
    monkeypatch.syspath_prepend(str(modules))
    path = shutil.copytree(tiny_model("llama"), tmp_path / "own")
    config = json.loads((path / "config.json").read_text())
    config |= {
        "model_type": "home_made",
        "auto_map": {
            "AutoConfig": "configuration_own.OwnConfig",
            "AutoModelForCausalLM": "modeling_own.OwnForCausalLM",
        },
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "configuration_own.py").write_text(OWN_CONFIG)
    (path / "modeling_own.py").write_text(OWN_MODEL)
    checkpoint = open_checkpoint(path, trust_remote_code=True)
    layout = layout_of(checkpoint.config, checkpoint.specs(), trust_remote_code=True)
    assert (layout.family, layout.block_path) == ("inferred", "model.layers")
    model = build_model(checkpoint.config, layout, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    with pytest.raises(CheckpointError, match="home_made"):
        build_model(checkpoint.config, layout)
