"""AutoRound by its authors, in its own environment:

    python peer_autoround.py MODEL TOKENS OUTPUT BITS GROUP ITERATIONS

TOKENS is a safetensors file with `tokens` (S, T). The result is written dense, in fp32, so that any reader measures it.
"""

import sys

import torch
from auto_round import AutoRound
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(model: str, tokens: str, output: str, bits: str, group: str, iterations: str) -> None:
    """Load, quantise, save."""
    windows = load_file(tokens)["tokens"].long()
    tokenizer = AutoTokenizer.from_pretrained(model)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    samples = [{"input_ids": row[None], "attention_mask": torch.ones_like(row)[None]} for row in windows]
    rounding = AutoRound(
        loaded,
        tokenizer,
        scheme="W4A16",
        bits=int(bits),
        group_size=int(group),
        sym=True,
        iters=int(iterations),
        dataset=torch.utils.data.DataLoader(samples, batch_size=None),
        seqlen=windows.shape[1],
        nsamples=len(windows),
        batch_size=8,
        device_map="cpu",
    )
    rounding.quantize_and_save(output, format="fake")


if __name__ == "__main__":
    main(*sys.argv[1:])
