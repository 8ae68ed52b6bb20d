"""The quantised cache in transformers: what it holds, what attention reads, generation, beams, memory."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicSlidingWindowLayer

from penjing.errors import PlanError
from penjing.methods.quantization.kivi import KVCache
from penjing.runtime.kv_cache import QuantizedCache, QuantizedLayer
from tiny_models import FAMILIES, token_windows

SMALL = {"group_size": 8, "residual": 16}
SETTINGS = KVCache(bits=4, **SMALL)


def states(tokens, seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, 3, tokens, width, generator=generator) for width in (16, 20)]


def fed(layer, keys, values, sizes):
    """The layer after these states came in pieces of these sizes, and what the last update returned."""
    seen = None
    for part in zip(keys.split(sizes, -2), values.split(sizes, -2), strict=True):
        length = layer.get_mask_sizes(part[0].shape[-2])[0]
        seen = layer.update(*part)
        assert seen[0].shape[-2] == seen[1].shape[-2] == length
    return layer, seen


def held(layer):
    """Every tensor in a layer."""
    return [tensor for half in layer._halves for tensor in (half.recent, *(half.packed.tensors if half.packed else ()))]


def same(one, other):
    return len(held(one)) == len(held(other)) and all(map(torch.equal, held(one), held(other)))


@pytest.mark.parametrize("window", [None, 21])
@pytest.mark.parametrize("tokens", [5, 16, 17, 32, 75])
def test_prompt_at_once_leaves_what_token_by_token_leaves(tokens, window):
    given = states(tokens)
    at_once = fed(QuantizedLayer(SETTINGS, window=window), *given, [tokens])[0]
    one_by_one = fed(QuantizedLayer(SETTINGS, window=window), *given, [1] * tokens)[0]
    assert same(at_once, one_by_one)
    assert at_once.get_seq_length() == tokens
    keys, values = at_once._halves
    if window is None:
        assert (keys.coded, values.coded) == (tokens // 16 * 16, max(tokens - 16, 0))


def test_attention_reads_the_new_and_the_newest_exactly_and_the_rest_as_decoded():
    keys, values = states(75)
    layer, seen = fed(QuantizedLayer(SETTINGS), keys, values, [75])
    assert torch.equal(seen[0], keys)
    assert torch.equal(seen[1], values)
    more = states(3, seed=1)
    seen = layer.update(*more)
    for got, old, new, coded in zip(seen, (keys, values), more, (64, 59), strict=True):
        assert torch.equal(got[..., coded:, :], torch.cat([old[..., coded:, :], new], -2))
        difference = (got[..., :coded, :] - old[..., :coded, :]).norm() / old[..., :coded, :].norm()
        assert 0.01 < difference < 0.15


@pytest.mark.parametrize("window", [21, 40])
def test_sliding_layer_shows_the_window(window):
    keys, values = states(75)
    layer = QuantizedLayer(KVCache(bits=8, **SMALL), window=window)
    stock = DynamicSlidingWindowLayer(sliding_window=window)
    for part in zip(keys.split(5, -2), values.split(5, -2), strict=True):
        assert layer.get_mask_sizes(5) == stock.get_mask_sizes(5)
        for got, expected in zip(layer.update(*part), stock.update(*part), strict=True):
            assert got.shape == expected.shape
            assert torch.allclose(got, expected, atol=0.02)
    assert all(half.tokens < window - 1 + SMALL["group_size"] for half in layer._halves)


@pytest.mark.parametrize("removed", [3, 11, 30, 75])
def test_crop_keeps_the_rest(removed):
    keys, values = states(75)
    layer = fed(QuantizedLayer(SETTINGS), keys, values, [75])[0]
    before = [half.decoded(new[..., :0, :]) for half, new in zip(layer._halves, (keys, values), strict=True)]
    layer.crop(-removed)
    assert layer.get_seq_length() == 75 - removed
    for half, old, new in zip(layer._halves, before, (keys, values), strict=True):
        assert torch.equal(half.decoded(new[..., :0, :]), old[..., : 75 - removed, :])
    layer.update(*states(40, seed=1))
    assert layer.get_seq_length() == 115 - removed


@pytest.mark.parametrize("window", [None, 21])
def test_recorded_past_is_taken_back_without_a_trace(window):
    keys, values = states(75)
    plain = fed(QuantizedLayer(SETTINGS, window=window), keys, values, [75])[0]
    recording = QuantizedLayer(SETTINGS, window=window)
    recording.activate_past_recording()
    fed(recording, keys, values, [75])
    recording.update(*states(9, seed=1))
    recording.crop(-9)
    assert same(plain, recording)


def test_a_window_that_forgot_cannot_be_cropped():
    layer = fed(QuantizedLayer(SETTINGS, window=21), *states(75), [75])[0]
    with pytest.raises(ValueError, match="activate_past_recording"):
        layer.crop(-1)


def test_sequences_are_reordered_repeated_and_selected():
    keys, values = states(40)
    layer = fed(QuantizedLayer(SETTINGS), keys, values, [40])[0]
    swapped = fed(QuantizedLayer(SETTINGS), keys[[1, 1]], values[[1, 1]], [40])[0]
    layer.reorder_cache(torch.tensor([1, 1]))
    assert same(layer, swapped)
    layer.batch_repeat_interleave(2)
    assert held(layer)[0].shape[0] == 4
    layer.batch_select_indices(torch.tensor([0]))
    layer.reset()
    assert layer.get_seq_length() == 0
    assert same(fed(layer, keys, values, [40])[0], fed(QuantizedLayer(SETTINGS), keys, values, [40])[0])


@pytest.mark.parametrize("window", [None, 21])
def test_memory_is_the_bytes_of_the_tensors(window):
    layer = fed(QuantizedLayer(SETTINGS, window=window), *states(75), [75])[0]
    memory = layer.memory()
    assert memory.bytes == sum(tensor.untyped_storage().nbytes() for tensor in held(layer))
    assert memory.full_bytes == 2 * 3 * (16 + 20) * 4 * (75 if window is None else 20)
    assert memory.tokens == 75
    assert layer.memory(torch.bfloat16).bytes < memory.bytes
    if window is None:
        longer = fed(layer, *states(160, seed=1), [160])[0].memory()
        assert longer.bytes - memory.bytes == 160 * memory.token_bytes


@pytest.mark.parametrize("family", FAMILIES)
def test_generation(family, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(family))
    prompt = token_windows(4, 40)
    keys = {"max_new_tokens": 24, "min_new_tokens": 24, "do_sample": False}
    full = model.generate(prompt, **keys)
    cache = QuantizedCache(model.config, bits=8, **SMALL)
    coded = model.generate(prompt, past_key_values=cache, **keys)
    assert (full == coded).all(1).sum() >= 2
    assert torch.equal(full[:, :41], coded[:, :41])  # the prompt is read at full precision
    memory = cache.memory()
    assert memory.tokens == 63
    assert memory.bytes < memory.full_bytes
    errors = []
    with torch.no_grad():
        expected = model(full).logits[:, 40:]
        for bits in (2, 4, 8):
            cache = QuantizedCache(model.config, bits=bits, **SMALL)
            model(full[:, :40], past_key_values=cache)
            got = torch.cat([model(token, past_key_values=cache).logits for token in full[:, 40:].split(1, 1)], 1)
            errors.append(float((got - expected).norm() / expected.norm()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 0.05


def test_padded_batch(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"))
    prompt = token_windows(2, 40)
    mask = torch.ones_like(prompt)
    mask[0, :9], prompt[0, :9] = 0, 0
    keys = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    cache = QuantizedCache(model.config, bits=8, **SMALL)
    plain, coded = model.generate(prompt, **keys), model.generate(prompt, past_key_values=cache, **keys)
    assert torch.equal(plain[:, :41], coded[:, :41])


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_beams_and_assistants(family, tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model(family))
    prompt = token_windows(1, 40)
    for keys in ({"num_beams": 3}, {"prompt_lookup_num_tokens": 3}):
        cache = QuantizedCache(model.config, bits=8, **SMALL)
        found = model.generate(prompt, past_key_values=cache, max_new_tokens=20, do_sample=False, **keys)
        plain = model.generate(prompt, max_new_tokens=20, do_sample=False, **keys)
        assert torch.equal(found[:, :44], plain[:, :44])


def test_layers_by_type(tiny_model):
    config = AutoConfig.from_pretrained(tiny_model("gemma3"))  # a window of 32, and a layer with full attention
    assert [type(layer).__name__ for layer in QuantizedCache(config).layers] == [
        "DynamicSlidingWindowLayer",
        "QuantizedLayer",
    ]
    assert [layer.sliding_window for layer in QuantizedCache(config, **SMALL).layers] == [32, None]


def test_a_state_space_layer_is_refused():
    config = AutoConfig.for_model("qwen3_next", num_hidden_layers=4)
    with pytest.raises(PlanError, match="'linear_attention' holds more than keys and values"):
        QuantizedCache(config)


def test_from_config(tiny_model):
    config = AutoConfig.from_pretrained(tiny_model("llama"))
    with pytest.raises(PlanError, match="has no `kv_cache`"):
        QuantizedCache.from_config(config)
    config.kv_cache = {"bits": 2, "group_size": 8, "residual": 16}
    assert QuantizedCache.from_config(config).layers[0].settings == KVCache(bits=2, group_size=8, residual=16)
