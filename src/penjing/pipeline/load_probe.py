"""Load a model directory the way a user does and save the logits it gives. Run as a script, in a process of its own.

It is started by path, so that `penjing` is not imported and only what a stranger has is used; a format that needs
`import penjing` says so on the command line.

    python load_probe.py DIRECTORY PROBE OUTPUT no-code|own-code next-token|classes|none [MODULE_TO_IMPORT]

With `own-code` the model may run the Python code in its directory.
"""

import importlib
import json
import sys

import torch
from safetensors.torch import load_file, save_file


def main(directory: str, probe: str, output: str, code: str, head: str, *modules: str) -> None:
    """Write fp32 answers and what the loader missed or did not expect.

    head  "next-token": logits (T, V) of a text; "classes": logits (B, C) of texts; "none": states (B, D) of their first
          tokens
    """
    for module in modules:
        importlib.import_module(module)
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    kinds = {"next-token": AutoModelForCausalLM, "classes": AutoModelForSequenceClassification, "none": AutoModel}
    model, info = kinds[head].from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, trust_remote_code=code == "own-code"
    )
    for parameter in model.parameters():  # beside bitsandbytes' codes, transformers leaves what was stored in bf16
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()
    for module in model.modules():  # its fused kernel rounds inputs and products to bf16
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    tokens = load_file(probe)["tokens"]
    with torch.no_grad():
        if head == "next-token":
            logits = model(input_ids=tokens, use_cache=False).logits[0]
        else:
            answer = model(input_ids=tokens)
            logits = answer.logits if head == "classes" else answer.last_hidden_state[:, 0]
    found = {key: sorted(str(name) for name in info.get(key, ())) for key in ("missing_keys", "unexpected_keys")}
    save_file({"logits": logits.float().contiguous()}, output, {"found": json.dumps(found)})


if __name__ == "__main__":
    main(*sys.argv[1:])
