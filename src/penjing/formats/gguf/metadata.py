"""What llama.cpp must know of a model besides its tensors, made from config.json, and what it cannot be told.

The keys are those of `checkpoint.gguf_names`, read the other way round, with what llama.cpp's own converter adds:
widths of heads, rotated dimensions, stretched rotary embeddings.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from penjing.checkpoint.gguf_names import ARCHITECTURES, WRITTEN_AS, Architecture
from penjing.errors import CheckpointError
from penjing.models.build import complete_config

LEAST_WINDOW = 512
"""A sliding window, in tokens, that is worth writing as the context of a model that llama.cpp runs without one."""

_FIXED = {
    "attention_bias": "llama.cpp has no place for biases of these linears",
    "mlp_bias": "llama.cpp has no place for biases of these linears",
    "use_sliding_window": "llama.cpp runs this architecture without a sliding window",
    "scale_attn_by_inverse_layer_idx": "llama.cpp does not scale attention by layer",
}
_GEMMA3_PATTERN = 6


def architecture_name(config: Mapping[str, Any]) -> str:
    """What llama.cpp calls the architecture. Raises CheckpointError that names those that can be written."""
    name = WRITTEN_AS.get(str(config.get("model_type")))
    if name is None:
        raise CheckpointError(
            f"model type {config.get('model_type')!r} cannot be written as GGUF; known: {', '.join(WRITTEN_AS)}"
        )
    return name


def config_problems(config: Mapping[str, Any]) -> list[str]:
    """What the model does that a file of its architecture cannot say."""
    full = complete_config(config)
    problems = [f"{key} is {full[key]}: {reason}" for key, reason in _FIXED.items() if full.get(key)]
    if full["model_type"] == "mistral" and (full.get("sliding_window") or LEAST_WINDOW) < LEAST_WINDOW:
        problems.append(
            f"a sliding window of {full['sliding_window']} tokens: llama.cpp runs this architecture without one, and "
            "the model is only the same inside the window; set `sliding_window: null` if you mean it"
        )
    if full["model_type"] == "qwen3" and full.get("head_dim") is None:
        problems.append("head_dim is missing")
    activation = full.get("hidden_activation") or full.get("hidden_act") or full.get("activation_function")
    expected = ARCHITECTURES[architecture_name(config)].constants
    wanted = next((value for key, value in expected.items() if key.startswith(("hidden_act", "activation"))), None)
    if activation != wanted:
        problems.append(f"the activation is {activation!r}; llama.cpp computes {wanted!r} for this architecture")
    return problems + _gemma_problems(full) + _rope_problems(full)


def _gemma_problems(full: Mapping[str, Any]) -> list[str]:
    kind = full["model_type"]
    if not kind.startswith("gemma"):
        return []
    problems = []
    large = full["num_hidden_layers"] in (46, 62) and full["num_attention_heads"] == 32
    scale = full["hidden_size"] // full["num_attention_heads"] if large else full["head_dim"]
    if full["query_pre_attn_scalar"] != scale:
        problems.append(f"query_pre_attn_scalar is {full['query_pre_attn_scalar']}; llama.cpp computes with {scale}")
    every = 2 if kind == "gemma2" else _GEMMA3_PATTERN
    layers = range(full["num_hidden_layers"])
    pattern = ["full_attention" if (layer + 1) % every == 0 else "sliding_attention" for layer in layers]
    if full["layer_types"] != pattern:
        problems.append(
            f"layer_types do not have full attention in every block of number {every}, {2 * every}, ... and a sliding "
            "window in the others, as llama.cpp computes"
        )
    return problems


def rope_of(full: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Parameters of the rotary embedding, and those of blocks with a sliding window where they have their own."""
    told = full.get("rope_parameters") or {}
    if "full_attention" in told:
        return dict(told["full_attention"]), dict(told.get("sliding_attention") or {})
    return dict(told), {}


def _rope_problems(full: Mapping[str, Any]) -> list[str]:
    rope, local = rope_of(full)
    kind = rope.get("rope_type", "default")
    own = {"phi3": "longrope", "llama": "llama3", "mistral": "llama3"}.get(full["model_type"])
    known = ("default", "linear", "yarn", own)
    problems = [] if kind in known else [f"rotary embeddings of type {kind!r} cannot be written"]
    if local.get("rope_type", "default") != "default":
        problems.append("rotary embeddings of blocks with a sliding window are stretched, which cannot be written")
    if local and local.get("rope_theta") != 10000.0:
        problems.append(f"rope_theta is {local.get('rope_theta')} in blocks with a sliding window; llama.cpp has 10000")
    if rope.get("partial_rotary_factor", 1.0) != 1.0 and full["model_type"] != "phi3":
        problems.append("partly rotated heads cannot be written for this architecture")
    return problems


def model_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """Every key that follows `<architecture>.`, with its full name."""
    full = complete_config(config)
    name = architecture_name(config)
    architecture = ARCHITECTURES[name]
    rope, local = rope_of(full)
    values = {**full, "rope_theta": rope.get("rope_theta"), "rope_local_base_freq": local.get("rope_theta")}
    if full["model_type"] == "gpt2":
        values["n_inner"] = full.get("n_inner") or 4 * full["n_embd"]
    if full["model_type"] == "mistral" and full.get("sliding_window"):
        values["max_position_embeddings"] = min(full["max_position_embeddings"], full["sliding_window"])
    keys = {key: values.get(told) for key, told in architecture.keys.items()}
    keys["vocab_size"] = full["vocab_size"]
    if full["model_type"] != "gpt2":
        keys |= _head_keys(full, rope, architecture) | _stretching(full, rope)
    return {f"{name}.{key}": _typed(key, value) for key, value in keys.items() if value is not None}


def _head_keys(full: Mapping[str, Any], rope: Mapping[str, Any], architecture: Architecture) -> dict[str, Any]:
    width = full.get("head_dim") or full["hidden_size"] // full["num_attention_heads"]
    rotated = int(width * rope.get("partial_rotary_factor", 1.0))
    keys = {"attention.key_length": width, "attention.value_length": width, "rope.dimension_count": rotated}
    return keys if architecture.model_type != "phi3" else {"rope.dimension_count": rotated}


def _stretching(full: Mapping[str, Any], rope: Mapping[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    original = int(rope.get("original_max_position_embeddings") or full.get("original_max_position_embeddings") or 0)
    if kind in ("linear", "yarn"):
        keys = {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
        return keys | ({"rope.scaling.original_context_length": original} if kind == "yarn" else {})
    if kind == "longrope":
        stretched = full["max_position_embeddings"] / original
        factor = math.sqrt(1 + math.log(stretched) / math.log(original)) if stretched > 1 else 1.0
        return {"rope.scaling.original_context_length": original, "rope.scaling.attn_factor": factor}
    return {}


def rope_vectors(config: Mapping[str, Any]) -> dict[str, list[float]]:
    """Factors by which frequencies are divided, by the name of the tensor that holds them."""
    full = complete_config(config)
    rope, _ = rope_of(full)
    if rope.get("rope_type") == "longrope":
        return {f"rope_factors_{span}.weight": rope[f"{span}_factor"] for span in ("long", "short")}
    if rope.get("rope_type") != "llama3":
        return {}
    width = full.get("head_dim") or full["hidden_size"] // full["num_attention_heads"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    factors = []
    for position in range(0, width, 2):
        waves = rope["original_max_position_embeddings"] / (2 * math.pi * rope["rope_theta"] ** (position / width))
        smooth = min(max((waves - low) / (high - low), 0.0), 1.0)
        factors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return {"rope_freqs.weight": factors}


_REAL = ("epsilon", "freq_base", "freq_base_swa", "softcapping", "factor")


def _typed(key: str, value: Any) -> Any:
    """Numbers that llama.cpp reads as floats, also where config.json has `10000`."""
    return float(value) if key.endswith(_REAL) else value
