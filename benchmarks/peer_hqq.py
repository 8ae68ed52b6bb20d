"""HQQ by its authors, in its own environment: `python peer_hqq.py MODEL OUTPUT BITS GROUP`.

A group has a scale and a zero point, so that groups twice as wide take as many bits as those of symmetric methods. The
result is written dense, in fp32, so that any reader measures it.
"""

import sys

import torch
from hqq.core.quantize import Quantizer
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(model: str, output: str, bits: str, group: str) -> None:
    """Load, quantise, save."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for name, linear in loaded.model.named_modules():
        if isinstance(linear, torch.nn.Linear):
            codes, meta = Quantizer.quantize(
                linear.weight.data,
                nbits=int(bits),
                group_size=int(group),
                axis=1,
                bitpack=False,
                compute_dtype=torch.float32,
                device="cpu",
            )
            meta["scale"], meta["zero"] = (meta[key].half().float() for key in ("scale", "zero"))  # as they are stored
            meta["compute_dtype"] = torch.float32
            linear.weight.data = Quantizer.dequantize(codes, meta).reshape(linear.weight.shape)
            print(name, flush=True)
    loaded.save_pretrained(output)
    AutoTokenizer.from_pretrained(model).save_pretrained(output)


if __name__ == "__main__":
    main(*sys.argv[1:])
