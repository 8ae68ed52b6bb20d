"""Whole GGUF files: every family comes back as the model it was, and llama.cpp computes what transformers computes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from penjing import api
from penjing.checkpoint import open_checkpoint
from penjing.checkpoint.gguf_header import read_gguf_header
from penjing.errors import CheckpointError, PlanError
from penjing.formats.gguf.assembly import convert
from penjing.formats.gguf.metadata import rope_vectors
from penjing.formats.gguf.tokenizer import tokenizer_keys
from penjing.models import layout_of
from penjing.pipeline.stream import StreamedModel
from penjing.pipeline.weights import Weights
from runs import compress, recipe, texts
from tiny_models import token_windows, tokenizer

pytest.importorskip("gguf")

PLAIN_GEMMA3 = {"layers": 6, "layer_types": ["sliding_attention"] * 5 + ["full_attention"]}
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {},
    "gemma3": PLAIN_GEMMA3,
    "phi3": {},
    "gpt2": {},
}


def file_of(source: Path, directory: Path) -> Path:
    checkpoint = open_checkpoint(source)
    checkpoint.label = "tiny"  # llama.cpp looks for certain tokens in what is called Phi-3
    return convert(checkpoint, layout_of(checkpoint.config), directory, torch.float32)


def logits_of(source: Path, tokens: torch.Tensor) -> torch.Tensor:
    checkpoint = open_checkpoint(source)
    layout = layout_of(checkpoint.config, checkpoint.specs())
    stream = StreamedModel(checkpoint.config, layout, Weights(checkpoint, layout).live)
    states = stream.forward(tokens, torch.float32)
    with stream.head(torch.float32) as head:
        return head(states)


def llama_cpp_logits(path: Path, tokens: list[int]) -> torch.Tensor:
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(str(path), logits_all=True, verbose=False, n_ctx=64, n_threads=1, type_k=0, type_v=0)
    model.eval(tokens)
    return torch.from_numpy(np.array(model.scores[: model.n_tokens]))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_and_runs(tiny_model, tmp_path, family):
    source = tiny_model(family, **FAMILIES[family])
    path = file_of(source, tmp_path / family)
    before, after = open_checkpoint(source), open_checkpoint(tmp_path / family)
    assert {name: spec.shape for name, spec in after.specs().items()} == {
        name: spec.shape for name, spec in before.specs().items()
    }
    for name in before.specs():
        torch.testing.assert_close(after.load(name), before.load(name).float(), rtol=0, atol=1e-6)
    tokens = token_windows(1, 24)
    expected = logits_of(source, tokens)
    torch.testing.assert_close(logits_of(path, tokens), expected, rtol=1e-4, atol=1e-4)
    found = llama_cpp_logits(path, tokens[0].tolist())
    assert (found - expected).norm() < 1e-2 * expected.norm()


@pytest.mark.parametrize("family", ["opt", "gpt_neox", "mixtral", "qwen3_moe"])
def test_other_families_are_refused_by_the_plan(tiny_model, family):
    with pytest.raises(PlanError, match="cannot be written as GGUF; known: llama"):
        api.plan(tiny_model(family), {"version": 1, "steps": [{"method": "rtn", "type": "q8_0"}], "format": "gguf"})


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("llama", {"attention_bias": True}, "attention_bias is True"),
        ("mistral", {}, "sliding window of 32 tokens"),
        ("gemma2", {"query_pre_attn_scalar": 48}, "query_pre_attn_scalar is 48; llama.cpp computes with 16"),
        ("gemma2", {"tied": False}, "embedding as its head"),
        ("gemma3", {}, "full attention in every block of number 6"),
        ("qwen2", {"hidden_act": "gelu"}, "the activation is 'gelu'"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "type 'dynamic'"),
    ],
)
def test_what_llama_cpp_cannot_compute_is_refused_by_the_plan(tiny_model, family, options, reason):
    source = tiny_model(family, **options)
    with pytest.raises(PlanError, match=reason):
        api.plan(source, {"version": 1, "steps": [{"method": "rtn", "type": "q8_0"}], "format": "gguf"})


def test_stretched_rotary_embeddings_come_back(tiny_model, tmp_path):
    told = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192, "rope_theta": 500000.0}  # fmt: skip
    source = tiny_model("llama", head_dim=64, rope_parameters=told)
    found = open_checkpoint(file_of(source, tmp_path / "x")).config
    assert {**found["rope_scaling"], "rope_theta": found["rope_theta"]} == told
    factors = rope_vectors(open_checkpoint(source).config)["rope_freqs.weight"]
    assert (factors[0], factors[-1]) == (1.0, 8.0)


def test_a_run_writes_one_file(tiny_model, tmp_path):
    """GPTQ on two-level scales, a fallback that is reported, the embedding in another type; llama.cpp runs it."""
    source = tiny_model("llama", hidden_size=256, head_dim=32, num_attention_heads=8, inner=288)
    steps = [
        {"method": "gptq", "type": "q4_k", "scale_search": "diagonal"},
        {"method": "rtn", "targets": ["embedding"], "type": "q6_k", "scale_search": "weights"},
    ]
    report = compress(source, recipe(texts(tmp_path / "text"), *steps, format="gguf"), tmp_path / "out")
    path = tmp_path / "out" / "out.gguf"
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {".penjing", "out.gguf", "README.md", "recipe.yaml", "report.html", "report.json"}
    kinds = {name: tensor.quantization.name for name, tensor in read_gguf_header(path).tensors.items()}
    assert kinds["token_embd.weight"] == "Q6_K"
    assert kinds["blk.0.attn_q.weight"] == "Q4_K"
    assert kinds["blk.0.ffn_down.weight"] == "IQ4_NL"
    assert kinds["blk.1.attn_norm.weight"] == "F32"
    rows = {row.name: row for row in report.modules}
    assert "iq4_nl instead of q4_k" in rows["model.layers.0.mlp.down_proj"].notes[-1]
    assert all(row.bytes == row.predicted_bytes for row in report.modules)
    assert report.bytes == path.stat().st_size
    assert report.verification["difference"] < 1e-6
    assert api.verify(tmp_path / "out").tensors == report.verification["tensors"]
    probe = load_file(tmp_path / "out" / ".penjing" / "probe.safetensors")
    found = llama_cpp_logits(path, probe["tokens"][0].tolist())[-len(probe["logits"]) :]
    divergence = torch.nn.functional.kl_div(
        found.log_softmax(-1), probe["logits"].log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert divergence < 0.05  # llama.cpp rounds inputs to 8 bits


TYPES = ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0", "iq4_nl", "mxfp4")
SUPER_BLOCKS = ("q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "tq2_0", "tq1_0")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def test_llama_cpp_computes_with_every_type(tiny_model, tmp_path):
    """One type per linear of two blocks, the embedding in 16 bits."""
    source = tiny_model("llama", hidden_size=256, head_dim=32, num_attention_heads=8, inner=256)
    steps = [
        {"method": "rtn", "type": kind, "targets": [f"*.layers.{block}.*.{linear}"]}
        for block, kinds in enumerate((TYPES, SUPER_BLOCKS))
        for kind, linear in zip(kinds, LINEARS, strict=True)
    ]
    wanted = recipe(texts(tmp_path / "text"), *steps, format="gguf") | {"dtype": "bfloat16"}
    compress(source, wanted, tmp_path / "out", evaluated=False)
    path = tmp_path / "out" / "out.gguf"
    kinds = [tensor.quantization.name for tensor in read_gguf_header(path).tensors.values()]
    assert {*kinds} == {kind.upper() for kind in (*TYPES, *SUPER_BLOCKS)} | {"F32", "BF16"}
    tokens = token_windows(1, 24)
    found, expected = llama_cpp_logits(path, tokens[0].tolist()), logits_of(path, tokens)
    divergence = torch.nn.functional.kl_div(
        found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert divergence < 0.1  # llama.cpp rounds inputs to 8 bits


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_files(tiny_model, tmp_path, dtype):
    source = tiny_model("llama")
    checkpoint = open_checkpoint(source)
    path = convert(checkpoint, layout_of(checkpoint.config), tmp_path, dtype)
    tokens = token_windows(1, 24)
    found, expected = llama_cpp_logits(path, tokens[0].tolist()), logits_of(path, tokens)
    assert (found - expected).norm() < 2e-2 * expected.norm()


def test_from_gguf_to_gguf(tiny_model, tmp_path):
    """The tokenizer's metadata stays as it was; what was 4-bit is quantised from the values it stood for."""
    source = tiny_model("llama")
    first = tmp_path / "a" / "a.gguf"
    eight, five = {"method": "rtn", "type": "q8_0"}, {"method": "rtn", "type": "q5_1", "scale_search": "weights"}
    short = texts(tmp_path / "text")
    compress(source, recipe(short, eight, format="gguf"), tmp_path / "a", evaluated=False)
    compress(first, recipe(short, five, format="gguf"), tmp_path / "b", evaluated=False)
    before, after = (read_gguf_header(tmp_path / name / f"{name}.gguf") for name in "ab")
    tokenizer_of = [{k: v for k, v in each.keys.items() if k.startswith("tokenizer")} for each in (before, after)]
    assert tokenizer_of[0] == tokenizer_of[1]
    assert after.tensors["blk.0.ffn_up.weight"].quantization.name == "Q5_1"


def test_byte_level_tokenizers(tiny_model):
    checkpoint = open_checkpoint(tiny_model("llama"))
    keys = tokenizer_keys(dict(checkpoint.files()), checkpoint.config)
    assert keys["tokenizer.ggml.pre"] == "gpt-2"
    assert keys["tokenizer.ggml.token_type"][:4] == [3, 3, 3, 1]
    assert (keys["tokenizer.ggml.bos_token_id"], keys["tokenizer.ggml.add_bos_token"]) == (1, False)
    assert keys["tokenizer.chat_template"] == tokenizer().chat_template
    assert len(keys["tokenizer.ggml.tokens"]) == checkpoint.config["vocab_size"]


def _pieces(**model):
    """A tokenizer as SentencePiece has it: three pieces, bytes, a merge."""
    vocabulary = {"<unk>": 0, "<s>": 1, "▁": 2, "a": 3, "▁a": 4, **{f"<0x{b:02X}>": 5 + b for b in range(256)}}
    told = {
        "added_tokens": [{"id": 1, "content": "<s>", "special": True}, {"id": 262, "content": "<x>", "special": False}],
        "normalizer": {"type": "Prepend", "prepend": "▁"},
        "pre_tokenizer": None,
        "post_processor": {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>"}}, {"Sequence": {}}]},
        "model": {"type": "BPE", "byte_fallback": True, "unk_token": "<unk>", "vocab": vocabulary,
                  "merges": [["▁", "a"]], **model},
    }  # fmt: skip
    return {"tokenizer.json": json.dumps(told).encode(), "tokenizer_config.json": b'{"bos_token": "<s>"}'}


def test_tokenizers_of_pieces():
    keys = tokenizer_keys(_pieces(), {"vocab_size": 264})
    short = {key.removeprefix("tokenizer.ggml."): value for key, value in keys.items()}
    assert short["model"] == "llama"
    assert [short["token_type"][number] for number in (0, 1, 4, 5, 262, 263)] == [2, 3, 1, 6, 4, 5]
    assert short["tokens"][261:] == ["[PAD261]", "<x>", "[PAD263]"]
    assert (short["add_bos_token"], short["add_eos_token"], short["add_space_prefix"]) == (True, False, True)
    assert short["scores"][4] == 0.0


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "no tokenizer.json"),
        (_pieces(type="Unigram"), "kind Unigram"),
        (_pieces(byte_fallback=False), "neither byte-level"),
    ],
)
def test_tokenizers_that_cannot_be_written(files, reason):
    with pytest.raises(CheckpointError, match=reason):
        tokenizer_keys(files, {"vocab_size": 264})


def test_a_tokenizer_larger_than_the_embedding():
    with pytest.raises(CheckpointError, match="token of number 262 and the embedding only 200 rows"):
        tokenizer_keys(_pieces(), {"vocab_size": 200})
