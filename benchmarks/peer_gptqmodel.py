"""GPTQ by GPTQModel, in its own environment: `python peer_gptqmodel.py MODEL TOKENS OUTPUT BITS GROUP`.

TOKENS is a safetensors file with `tokens` (S, T). Symmetric, its own defaults otherwise; the result is a checkpoint in
the format `gptq`.
"""

import sys

import gptqmodel
from gptqmodel import GPTQModel, QuantizeConfig
from safetensors.torch import load_file


def main(model: str, tokens: str, output: str, bits: str, group: str) -> None:
    """Load, quantise, save."""
    gptqmodel._default_cpu_workers = lambda: 2  # it counts one on two cores, and needs two
    windows = load_file(tokens)["tokens"]
    samples = [{"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in windows]
    config = QuantizeConfig(bits=int(bits), group_size=int(group), sym=True, offload_to_disk=False)
    loaded = GPTQModel.load(model, config, device="cpu")
    loaded.quantize(samples, batch_size=1)
    loaded.save(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
