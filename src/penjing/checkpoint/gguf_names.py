"""What llama.cpp calls things, and what Hugging Face calls them: tensors and config keys per GGUF architecture."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

_LLAMA_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_GEMMA_BLOCK = _LLAMA_BLOCK | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LLAMA_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

_SIZES = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_GEMMA_SIZES = _SIZES | {"attention.sliding_window": "sliding_window", "attention.key_length": "head_dim"}


@dataclass(frozen=True)
class Architecture:
    """One GGUF architecture as Hugging Face knows it.

    outside, block  tensor names without and with the prefix `blk.<i>.` -> module names
    block_path      where the blocks are in the Hugging Face model
    keys            metadata keys (after `<architecture>.`) -> keys of config.json
    constants       entries of config.json that the architecture implies
    rotary          "interleaved": query and key rows pair up neighbours and have to be put back in halves
    norm_offset     already added to the norms in the file
    transposed      modules that Hugging Face stores as (inputs, outputs)
    """

    model_type: str
    class_name: str
    block: Mapping[str, str]
    outside: Mapping[str, str]
    keys: Mapping[str, str]
    constants: Mapping[str, object]
    block_path: str = "model.layers"
    rotary: Literal["interleaved", "halves"] = "halves"
    norm_offset: float = 0.0
    transposed: frozenset[str] = frozenset()

    def stored_name(self, module: str) -> str | None:
        """What a module is called in a file, without its parameter; None for one that has no place there."""
        for stored, name in self.outside.items():
            if name == module:
                return stored
        path, _, rest = module.removeprefix(f"{self.block_path}.").partition(".")
        found = next((stored for stored, name in self.block.items() if name == rest), None)
        if found is None or not module.startswith(f"{self.block_path}.") or not path.isdigit():
            return None
        return f"blk.{path}.{found}"


ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        "llama",
        "LlamaForCausalLM",
        _LLAMA_BLOCK,
        _LLAMA_OUTSIDE,
        _SIZES,
        {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
        rotary="interleaved",
    ),
    "qwen2": Architecture(
        "qwen2",
        "Qwen2ForCausalLM",
        _LLAMA_BLOCK,
        _LLAMA_OUTSIDE,
        _SIZES,
        {"hidden_act": "silu", "use_sliding_window": False},
    ),
    "qwen3": Architecture(
        "qwen3",
        "Qwen3ForCausalLM",
        _LLAMA_BLOCK | _HEAD_NORMS,
        _LLAMA_OUTSIDE,
        _SIZES,
        {"hidden_act": "silu", "attention_bias": False, "use_sliding_window": False},
    ),
    "gemma2": Architecture(
        "gemma2",
        "Gemma2ForCausalLM",
        _GEMMA_BLOCK,
        _LLAMA_OUTSIDE,
        _GEMMA_SIZES
        | {
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        {"hidden_activation": "gelu_pytorch_tanh"},
        norm_offset=1.0,
    ),
    "gemma3": Architecture(
        "gemma3_text",
        "Gemma3ForCausalLM",
        _GEMMA_BLOCK | _HEAD_NORMS,
        _LLAMA_OUTSIDE,
        _GEMMA_SIZES | {"rope.freq_base_swa": "rope_local_base_freq"},
        {"hidden_activation": "gelu_pytorch_tanh", "sliding_window_pattern": 6, "rope_theta": 1e6},
        norm_offset=1.0,
    ),
    "phi3": Architecture(
        "phi3",
        "Phi3ForCausalLM",
        {
            "attn_norm": "input_layernorm",
            "attn_qkv": "self_attn.qkv_proj",
            "attn_output": "self_attn.o_proj",
            "ffn_norm": "post_attention_layernorm",
            "ffn_up": "mlp.gate_up_proj",
            "ffn_down": "mlp.down_proj",
        },
        _LLAMA_OUTSIDE,
        _SIZES | {"attention.sliding_window": "sliding_window"},
        {"hidden_act": "silu"},
    ),
    "gpt2": Architecture(
        "gpt2",
        "GPT2LMHeadModel",
        {
            "attn_norm": "ln_1",
            "attn_qkv": "attn.c_attn",
            "attn_output": "attn.c_proj",
            "ffn_norm": "ln_2",
            "ffn_up": "mlp.c_fc",
            "ffn_down": "mlp.c_proj",
        },
        {
            "token_embd": "transformer.wte",
            "position_embd": "transformer.wpe",
            "output_norm": "transformer.ln_f",
            "output": "lm_head",
        },
        {
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "block_count": "n_layer",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
        {"activation_function": "gelu_new"},
        block_path="transformer.h",
        transposed=frozenset({"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}),
    ),
}

WRITTEN_AS: Mapping[str, str] = {
    **{architecture.model_type: name for name, architecture in ARCHITECTURES.items()},
    "mistral": "llama",
}
"""Model type of a config.json -> the architecture that llama.cpp runs it as."""
