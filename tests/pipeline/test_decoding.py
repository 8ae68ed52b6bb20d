"""Evaluation through a quantised cache: streamed, it is what the model itself computes; the API, recipes."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import penjing
from penjing.checkpoint import open_checkpoint
from penjing.cli import main
from penjing.errors import PlanError
from penjing.methods.quantization.kivi import KVCache
from penjing.models import layout_of
from penjing.pipeline import decoding, measure
from penjing.pipeline.stream import StreamedModel
from penjing.pipeline.weights import Weights
from penjing.runtime.kv_cache import QuantizedCache
from tiny_models import FAMILIES, token_windows

SETTINGS = KVCache(bits=2, group_size=8, residual=16)


def streamed(directory):
    checkpoint = open_checkpoint(directory)
    layout = layout_of(checkpoint.config, checkpoint.specs())
    return StreamedModel(checkpoint.config, layout, Weights(checkpoint, layout).live)


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_is_what_the_model_computes(family, tiny_model):
    directory = tiny_model(family)
    tokens = token_windows(2, 60)
    candidate, held = decoding.run(streamed(directory), tokens, SETTINGS, torch.float32)
    model = AutoModelForCausalLM.from_pretrained(directory)
    for window, states in zip(tokens, candidate.states, strict=True):
        cache = QuantizedCache(model.config, **SETTINGS.model_dump())
        with torch.no_grad(), candidate.stream.head(torch.float32) as head:
            chunks = window[None].split(SETTINGS.group_size, 1)
            expected = torch.cat([model(chunk, past_key_values=cache).logits for chunk in chunks], 1)[0]
            assert torch.allclose(head(states[None]), expected, atol=1e-4)
        assert cache.memory() == held


def test_fewer_bits_are_worse_and_none_is_the_full_cache(tiny_model):
    stream, tokens = streamed(tiny_model("llama")), token_windows(2, 60)
    reference = measure.run(stream, tokens)
    assert torch.equal(decoding.run(stream, tokens, None, torch.float32)[0].states, reference.states)
    kl = []
    for bits in (2, 4, 8):
        cache = SETTINGS.model_copy(update={"bits": bits})
        candidate, _ = decoding.run(stream, tokens, cache, torch.bfloat16)
        kl.append(measure.compare(candidate, tokens, reference).result().kl)
    assert kl[0] > 4 * kl[1] > 0


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Water, light and patience; wire, shears and patience again. " * 40)
    return path


def test_command_line(tiny_model, text, capsys):
    words = ["eval", str(tiny_model("llama")), "--data", str(text), "--windows", "2", "--length", "48"]
    words += ["--kv-bits", "2", "--kv-group", "8", "--kv-residual", "16"]
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["model"].endswith("2-bit KV cache")
    assert result["kl"] > 0
    assert result["kv_cache"]["bytes"] < result["kv_cache"]["full_bytes"]
    assert "2 bits, groups of 8, residual 16, chunks of 8 tokens" in result["protocol"]["sentence"]
    assert main(words) == 0
    assert "KV cache of 48 tokens" in capsys.readouterr().out
    assert main([*words, "--kv-residual", "20"]) == 2
    assert "not a multiple of group_size 8" in capsys.readouterr().err


def test_recipe(tiny_model, text, tmp_path):
    recipe = {
        "steps": [{"method": "rtn", "bits": 8, "group_size": 16}],
        "format": "dense",
        "evaluation": {"data": str(text), "windows": 2, "length": 48},
    }
    plain = penjing.compress(tiny_model("llama"), recipe, tmp_path / "plain")
    report = penjing.compress(tiny_model("llama"), recipe | {"kv_cache": SETTINGS.model_dump()}, tmp_path / "cached")
    assert plain.kv_cache is None and report.kv_cache.tokens == 48
    assert report.quality.kl > plain.quality.kl
    assert report.quality.reference_nll == plain.quality.reference_nll
    assert "KV cache" in report.protocol.sentence()
    config = AutoConfig.from_pretrained(tmp_path / "cached")
    assert QuantizedCache.from_config(config).layers[0].settings == SETTINGS
    again = penjing.compress(tmp_path / "cached", recipe, tmp_path / "again")
    assert again.kv_cache is None
    assert "kv_cache" not in json.loads((tmp_path / "again/config.json").read_text())


def test_a_state_space_model_is_refused_before_the_work():
    config = AutoConfig.for_model("qwen3_next", num_hidden_layers=4, num_experts=4, vocab_size=64).to_dict()
    decoding.require_cacheable(config, None, trust_remote_code=False)
    with pytest.raises(PlanError, match="linear_attention"):
        decoding.require_cacheable(config, SETTINGS, trust_remote_code=False)


@pytest.mark.demo
@pytest.mark.slow
def test_demo_model(capsys):
    kl = []
    for bits in (2, 4):
        assert main(["eval", "demo", "--windows", "1", "--length", "384", "--kv-bits", str(bits), "--json"]) == 0
        result = json.loads(capsys.readouterr().out)
        kl.append(result["kl"])
        assert result["kv_cache"]["full_token_bytes"] == 30 * 2 * 192 * 2  # blocks, keys and values, width, bf16
    assert kl[0] > 4 * kl[1] > 0
    assert kl[1] < 0.05
