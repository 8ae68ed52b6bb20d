"""GPTQ or AWQ by llmcompressor, in its own environment:

    python peer_llmcompressor.py MODEL TOKENS OUTPUT BITS GROUP DTYPE gptq|awq [WINDOWS]

TOKENS is a safetensors file with `tokens` (S, T). The same windows, in the same order, as Penjing gets, or the
first WINDOWS of them.
"""

import sys

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import GPTQModifier, QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM


def main(model: str, tokens: str, output: str, bits: str, group: str, dtype: str, method: str, count: str = "") -> None:
    """Load, quantise, save."""
    windows = load_file(tokens)["tokens"][: int(count) if count else None]
    samples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in windows]
    scheme = {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": int(bits),
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": int(group),
            },
        }
    }
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
    rounding = {"config_groups": scheme, "ignore": ["lm_head"]}
    recipes = {"gptq": [GPTQModifier(**rounding)], "awq": [AWQModifier(), QuantizationModifier(**rounding)]}
    if not torch.accelerator.is_available():  # AWQ pins its cache for a device that is not there
        IntermediatesCache.pin_memory = lambda *_, **__: None
    oneshot(
        model=loaded,
        dataset=Dataset.from_list(samples),
        recipe=recipes[method],
        max_seq_length=windows.shape[1],
        num_calibration_samples=len(windows),
        output_dir=output,
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
