"""Tiny random models of every family, saved the way transformers saves them, with a tiny tokenizer. Offline.

Weights have the scale of trained ones and a few outlier channels, so that rounding and pruning have something to
get wrong; logits are far from uniform.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

VOCABULARY = 300
HIDDEN, HEADS, KV_HEADS, HEAD_DIM = 64, 4, 2, 16
SPECIAL = ["<pad>", "<s>", "</s>"]
TEXT = [
    "The old pine stands in a shallow pot, and the whole mountain stands in the pine.",
    "To make a large thing small is to choose what must be kept.",
    "Water, light and patience; wire, shears and patience again.",
    "A tree of ninety years fits on a table: 1932, 1964, 2011, 2026.",
]

_LLAMA_LIKE: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "max_position_embeddings": 512,
}
_GEMMA = {**_LLAMA_LIKE, "head_dim": HEAD_DIM, "query_pre_attn_scalar": HEAD_DIM, "sliding_window": 32}
_EXPERTS = {"num_experts_per_tok": 2}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_LLAMA_LIKE},
    "mistral": {"model_type": "mistral", **_LLAMA_LIKE, "sliding_window": 32},
    "qwen2": {"model_type": "qwen2", **_LLAMA_LIKE},
    "qwen3": {"model_type": "qwen3", **_LLAMA_LIKE, "head_dim": HEAD_DIM},
    "gemma2": {"model_type": "gemma2", **_GEMMA},
    "gemma3": {"model_type": "gemma3_text", **_GEMMA},
    "phi3": {"model_type": "phi3", **_LLAMA_LIKE, "original_max_position_embeddings": 512},
    "gpt2": {"model_type": "gpt2", "n_embd": HIDDEN, "n_head": HEADS, "n_positions": 512},
    "opt": {
        "model_type": "opt",
        "hidden_size": HIDDEN,
        "word_embed_proj_dim": HIDDEN,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 512,
    },
    "gpt_neox": {
        "model_type": "gpt_neox",
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "max_position_embeddings": 512,
    },
    "mixtral": {"model_type": "mixtral", **_LLAMA_LIKE, **_EXPERTS, "num_local_experts": 4},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **_LLAMA_LIKE,
        **_EXPERTS,
        "head_dim": HEAD_DIM,
        "num_experts": 4,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
}
"""Family name -> config entries. Layers, inner width, vocabulary and ties are arguments of `build`."""

_LAYERS = {"gpt2": "n_layer"}
_INNER = {"gpt2": "n_inner", "opt": "ffn_dim"}


def build(
    family: str,
    directory: Path,
    *,
    tied: bool | None = None,
    layers: int = 2,
    inner: int = 96,
    seed: int = 0,
    calm: bool = False,
    dtype: str = "float32",
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Save a tiny model of `family` in `directory` and return it.

    `tied` is the family's own habit by default; `inner` is the MLP width (172 divides into no group of 64);
    `calm` lets every block add less to the states that pass it, as trained ones do, and no channel of a norm stand out:
    at random, each block turns the states over and makes a small error of the one before it a large one.
    `overrides` are entries of config.json.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    entries = {**FAMILIES[family], "vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    entries |= {_LAYERS.get(family, "num_hidden_layers"): layers, _INNER.get(family, "intermediate_size"): inner}
    if family == "gemma3":
        entries["layer_types"] = [("sliding_attention", "full_attention")[index % 2] for index in range(layers)]
    if tied is not None:
        entries["tie_word_embeddings"] = tied
    entries |= overrides
    config = AutoConfig.for_model(entries.pop("model_type"), **entries)
    model = AutoModelForCausalLM.from_config(config)
    _randomise(model, seed)
    if calm:
        _calm(model)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=0)
    model.to(getattr(torch, dtype)).save_pretrained(directory, max_shard_size=max_shard_size)
    tokenizer().save_pretrained(directory)
    return directory


def tokenizer() -> Any:
    """A byte-level BPE tokenizer of 300 tokens, trained on a few sentences, with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(TEXT, trainer)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2]
    )
    wrapped.chat_template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
    )
    return wrapped


def piece_tokenizer() -> Any:
    """A BPE tokenizer over pieces of text that falls back to bytes, of 300 tokens: the kind that Gemma has."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    merges = [
        (pair[0], pair[1])
        for pair in ("\u2581t", "he", "in", "er", "an", "re", "on", "at", "en", "nd", "ti", "es", "or")
    ]
    pieces = [*"\u2581abcdefghijklmnopqrstuvwxyz", *map("".join, merges)]
    texts = [*SPECIAL, "<unk>", *(f"<0x{number:02X}>" for number in range(256)), *pieces]
    vocabulary = {text: number for number, text in enumerate(texts)}
    inner = Tokenizer(models.BPE(vocabulary, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    inner.normalizer = normalizers.Replace(" ", "\u2581")
    inner.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2], unk_token="<unk>"
    )


def token_windows(windows: int = 2, length: int = 48, seed: int = 0) -> torch.Tensor:
    """Random token ids (windows, length) that are not special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL), VOCABULARY, (windows, length), generator=generator)


@torch.no_grad()
def _randomise(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name or "ln_" in name:
            base = 0.0 if name.endswith("bias") or model.config.model_type.startswith("gemma") else 1.0
            values = base + 0.1 * noise
            values[3], values[17 % len(values)] = values[3] + 3.0, values[17 % len(values)] - 2.0
        elif parameter.ndim == 1:
            values = 0.1 * noise
        else:
            values = noise / HIDDEN**0.5
            values.view(-1, values.shape[-1])[::29] *= 4.0
        parameter.copy_(values)


@torch.no_grad()
def _calm(model: torch.nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if "norm" in name or "ln_" in name:
            parameter.lerp_(parameter.median(), 0.75)
        elif re.search(r"\.\d+\.", name):
            parameter.mul_(0.25)
