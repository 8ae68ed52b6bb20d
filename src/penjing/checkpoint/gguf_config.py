"""config.json of a GGUF file, made from its metadata."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from penjing.checkpoint.gguf_header import GGUFHeader
from penjing.checkpoint.gguf_names import ARCHITECTURES, Architecture
from penjing.errors import CheckpointError

LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The published constants of Llama 3.1 and later; GGUF stores the frequencies that follow from them instead."""

ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_LARGEST_NUMBER, _SMALLEST_NUMBER = 2**31, 1e-30
_MAY_BE_ZERO = ("attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping")
"""Keys of which 0 means that there is none of it."""
SPECIAL_TOKENS = {"bos": "bos_token_id", "eos": "eos_token_id", "padding": "pad_token_id"}

LoadFactors = Callable[[str], Sequence[float]]


def architecture_of(header: GGUFHeader, path: Path) -> Architecture:
    """The architecture a file declares. Raises CheckpointError naming the ones that can be read."""
    name = str(header.keys.get("general.architecture"))
    if name not in ARCHITECTURES:
        raise CheckpointError(f"{path}: GGUF architecture {name!r} cannot be read; known: {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def make_config(header: GGUFHeader, path: Path, load_factors: LoadFactors) -> dict[str, Any]:
    """config.json for the file; `load_factors` reads a vector of rotary factors by its GGUF name."""
    architecture = architecture_of(header, path)
    prefix = header.keys["general.architecture"]
    if "token_embd.weight" not in header.tensors:
        raise CheckpointError(
            f"{path}: no tensor token_embd.weight; only whole models can be read, not adapters or parts"
        )
    _check_values(header, prefix, architecture, path)
    config: dict[str, Any] = {
        "model_type": architecture.model_type,
        "architectures": [architecture.class_name],
        **architecture.constants,
    }
    for key, name in architecture.keys.items():
        value = header.keys.get(f"{prefix}.{key}")
        if value == 0:
            config[name] = None
        elif value is not None:
            config[name] = _shortest(value) if isinstance(value, float) else value
    for key, name in SPECIAL_TOKENS.items():
        config[name] = header.keys.get(f"tokenizer.ggml.{key}_token_id")
    config["vocab_size"] = header.tensors["token_embd.weight"].shape[0]
    config["tie_word_embeddings"] = "output.weight" not in header.tensors
    config["dtype"] = "bfloat16"
    _require_integers(config, path)
    if architecture.model_type != "gpt2":
        _complete_attention(config, header, prefix, architecture)
        config |= _rope_scaling(config, header, prefix, path, load_factors)
    return config


_MORE_NUMBERS = ("attention.key_length", "rope.dimension_count", "rope.scaling.factor")
_ORIGINAL = "rope.scaling.original_context_length"


def _check_values(header: GGUFHeader, prefix: str, architecture: Architecture, path: Path) -> None:
    """What is read as a number is one, in bounds. Raises CheckpointError naming the key."""
    for key in (*architecture.keys, *_MORE_NUMBERS, _ORIGINAL):
        value = header.keys.get(f"{prefix}.{key}", 1)
        least = 0 if key in _MAY_BE_ZERO else _SMALLEST_NUMBER
        if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < _LARGEST_NUMBER:
            raise CheckpointError(f"{path}: {prefix}.{key} is {_shown(value)}, which no model has; the file is corrupt")
    for key in SPECIAL_TOKENS:
        token = header.keys.get(f"tokenizer.ggml.{key}_token_id", 0)
        if isinstance(token, bool) or not isinstance(token, int) or token < 0:
            raise CheckpointError(f"{path}: tokenizer.ggml.{key}_token_id is {_shown(token)}; the file is corrupt")
    blocks, held = header.keys.get(f"{prefix}.block_count", 0), len(header.tensors)
    if blocks > held:
        raise CheckpointError(f"{path}: {prefix}.block_count is {blocks} and the file has {held} tensors")


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) < 50 else f"{text[:50]}..."


def _shortest(value: float) -> float:
    """The decimal that was meant: 1e-05 and not 9.999999747378752e-06, which is its fp32 neighbour."""
    for digits in range(1, 10):
        rounded = float(f"{value:.{digits}g}")
        if struct.pack("f", rounded) == struct.pack("f", value):
            return rounded
    return value


def _require_integers(config: dict[str, Any], path: Path) -> None:
    aliases = {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"}
    for name, alias in aliases.items():
        key = alias if config["model_type"] == "gpt2" else name
        if not isinstance(config.get(key), int):
            raise CheckpointError(f"{path}: the metadata gives no usable {key} (it says {config.get(key)!r})")


def _complete_attention(config: dict[str, Any], header: GGUFHeader, prefix: str, architecture: Architecture) -> None:
    heads = config["num_attention_heads"]
    config.setdefault("num_key_value_heads", heads)
    config["head_dim"] = header.keys.get(f"{prefix}.attention.key_length", config["hidden_size"] // heads)
    rotated = header.keys.get(f"{prefix}.rope.dimension_count", config["head_dim"])
    if config["model_type"] == "phi3" and rotated != config["head_dim"]:
        config["partial_rotary_factor"] = rotated / config["head_dim"]
    if architecture.norm_offset:  # Gemma: only the 27B models scale queries by another width than the head's
        large = config["num_hidden_layers"] in (46, 62) and config["num_attention_heads"] == 32
        config["query_pre_attn_scalar"] = config["hidden_size"] // heads if large else config["head_dim"]
    name = str(header.keys.get("general.name", "")).lower()
    if config["model_type"] == "llama" and "mistral" in name:
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}


def _rope_scaling(
    config: dict[str, Any], header: GGUFHeader, prefix: str, path: Path, load: LoadFactors
) -> dict[str, Any]:
    """Config entries for stretched rotary embeddings. Raises CheckpointError for a kind that cannot be expressed."""
    if "rope_freqs.weight" in header.tensors:
        return {"rope_scaling": _llama3_scaling(config, load("rope_freqs.weight"), path)}
    kind = header.keys.get(f"{prefix}.rope.scaling.type", "none")
    original = header.keys.get(f"{prefix}.rope.scaling.original_context_length")
    if "rope_factors_long.weight" in header.tensors:
        factors = {f"{span}_factor": list(load(f"rope_factors_{span}.weight")) for span in ("long", "short")}
        return {"rope_scaling": {"type": "longrope", **factors}, "original_max_position_embeddings": original}
    if kind == "none":
        return {}
    factor = header.keys.get(f"{prefix}.rope.scaling.factor")
    if factor is None or kind not in ("linear", "yarn"):
        raise CheckpointError(f"{path}: rotary scaling {kind!r} (factor {factor}) cannot be expressed in a config")
    scaling = {"rope_type": kind, "factor": factor}
    return {"rope_scaling": scaling | ({"original_max_position_embeddings": original} if kind == "yarn" else {})}


def _llama3_scaling(config: dict[str, Any], factors: Sequence[float], path: Path) -> dict[str, Any]:
    """Recognise the frequency factors of Llama 3.1: 1 for short waves, `factor` for long ones, a ramp between."""
    factor = float(f"{max(factors):.4g}")
    low, high, original = LLAMA3_ROPE.values()
    for position, found in enumerate(factors):
        wavelength = 2 * math.pi * config["rope_theta"] ** (position / len(factors))
        smooth = min(max((original / wavelength - low) / (high - low), 0.0), 1.0)
        if abs(found * ((1 - smooth) / factor + smooth) - 1) > 1e-3:
            raise CheckpointError(f"{path}: rope_freqs.weight is not the scaling of Llama 3.1; it cannot be expressed")
    return {"rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}
