"""What the graph of a decoder needs to know of a model besides its weights, and which models have one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from penjing.models import build_model
from penjing.models.layout import Layout

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3_text")
_ROTARY = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose angles depend on the position alone."""
_ACTS = {"silu": "silu", "gelu_pytorch_tanh": "gelu"}
"""Activation in config.json -> that of the gate in the graph."""
_LOCAL = "sliding_attention"


class Angles(NamedTuple):
    """Cosines and sines (positions, rotated width / 2) fp32."""

    cos: np.ndarray
    sin: np.ndarray


class Facts(NamedTuple):
    """Sizes and constants.

    windows  tokens that each block sees, 0 where it sees all
    angles   of each block's rotary embedding, by a name that equal ones share
    act      of the gate: "silu", or "gelu" by tanh
    softcap  of attention scores and of logits; 0: none
    """

    heads: int
    kv_heads: int
    head_dim: int
    epsilon: float
    windows: tuple[int, ...]
    rotary: tuple[str, ...]
    angles: dict[str, Angles]
    act: str
    scale: float
    softcap: float
    logit_softcap: float
    embedding_scale: float
    norm_offset: float


def refusals(layout: Layout, config: Mapping[str, Any]) -> list[str]:
    """Why there is no graph for a model; empty if there is."""
    if layout.model_type not in FAMILIES:
        return [f"there are graphs for {', '.join(FAMILIES)}, not for {layout.model_type}; use format native"]
    found = []
    act = config.get("hidden_activation") or config.get("hidden_act") or "silu"
    if act not in _ACTS and not layout.model_type.startswith("gemma"):
        found.append(f"its hidden_act is {act!r} and the graphs know {', '.join(_ACTS)}; use format native")
    told = config.get("rope_parameters") or config.get("rope_scaling") or {}
    nested = [each for each in told.values() if isinstance(each, dict)] or [told]
    for kind in {each.get("rope_type") or each.get("type") or "default" for each in nested} - set(_ROTARY):
        found.append(f"its rotary embedding is {kind!r} and the graphs know {', '.join(_ROTARY)}; use format native")
    return found


def facts_of(layout: Layout, config: Mapping[str, Any]) -> Facts:
    """The facts as transformers' own configuration and rotary embedding have them."""
    model: Any = build_model(config, layout)
    told, rotary = model.config, model.model.rotary_emb
    window = getattr(told, "sliding_window", None) or 0
    kinds = getattr(told, "layer_types", None) or [_LOCAL] * layout.blocks
    by_kind = hasattr(rotary, f"{kinds[0]}_inv_freq")
    gemma = layout.model_type.startswith("gemma")
    head_dim = getattr(told, "head_dim", None) or told.hidden_size // told.num_attention_heads
    return Facts(
        heads=told.num_attention_heads,
        kv_heads=told.num_key_value_heads,
        head_dim=head_dim,
        epsilon=told.rms_norm_eps,
        windows=tuple(window if kind == _LOCAL else 0 for kind in kinds),
        rotary=tuple(f"{kind}_" if by_kind else "" for kind in kinds),
        angles={
            prefix: _angles(rotary, prefix, told.max_position_embeddings)
            for prefix in ({f"{kind}_" for kind in kinds} if by_kind else {""})
        },
        act=_ACTS[told.hidden_activation if gemma else told.hidden_act],
        scale=(getattr(told, "query_pre_attn_scalar", None) or head_dim) ** -0.5,
        softcap=getattr(told, "attn_logit_softcapping", None) or 0.0,
        logit_softcap=getattr(told, "final_logit_softcapping", None) or 0.0,
        embedding_scale=told.hidden_size**0.5 if gemma else 1.0,
        norm_offset=layout.norm_offset,
    )


def _angles(rotary: Any, prefix: str, positions: int) -> Angles:
    frequencies = getattr(rotary, f"{prefix}inv_freq").float().numpy()
    scaling = np.float32(getattr(rotary, f"{prefix}attention_scaling"))
    angles = np.outer(np.arange(positions), frequencies).astype(np.float32)
    return Angles(np.cos(angles) * scaling, np.sin(angles) * scaling)
