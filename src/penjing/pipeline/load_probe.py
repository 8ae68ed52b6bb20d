"""Load a model directory the way a user does and save the logits it gives. Run as a script, in a process of its own.

It is started by path, so that `penjing` is not imported and only what a stranger has is used; a format that needs
`import penjing` says so on the command line.

    python load_probe.py DIRECTORY PROBE OUTPUT no-code|own-code [MODULE_TO_IMPORT]

With `own-code` the model may run the Python code in its directory.
"""

import importlib
import json
import sys

import torch
from safetensors.torch import load_file, save_file


def main(directory: str, probe: str, output: str, code: str, *modules: str) -> None:
    """Write logits fp32, (T, V) of a text or (B, C) of a classifier's texts, and what the loader missed or did not
    expect."""
    for module in modules:
        importlib.import_module(module)
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    known = AutoConfig.from_pretrained(directory, trust_remote_code=code == "own-code").architectures or ()
    classifies = any(name.endswith("ForSequenceClassification") for name in known)
    kind = AutoModelForSequenceClassification if classifies else AutoModelForCausalLM
    model, info = kind.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True, trust_remote_code=code == "own-code"
    )
    tokens = load_file(probe)["tokens"]
    with torch.no_grad():
        logits = model(input_ids=tokens).logits if classifies else model(input_ids=tokens, use_cache=False).logits[0]
    found = {key: sorted(str(name) for name in info.get(key, ())) for key in ("missing_keys", "unexpected_keys")}
    save_file({"logits": logits.float().contiguous()}, output, {"found": json.dumps(found)})


if __name__ == "__main__":
    main(*sys.argv[1:])
