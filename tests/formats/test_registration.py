"""The native format is known to transformers after a cheap import; `test_loading` has the other half."""

from __future__ import annotations

import subprocess
import sys

import torch
from safetensors.torch import load_file, save_file

from format_cases import Case, grid, linear, write
from penjing.representations import Activations, Scheme


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_installing_the_hook_imports_nothing_heavy():
    code = (
        "import sys; from penjing import transformers_hook as h; h.install(); h.install()\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)), str(sys.meta_path).count('_AfterImport'))"
    )
    assert run(code) == "[] 1"


def test_names_without_the_prefix_of_the_base_model(tiny_model, tmp_path):
    """GPT-2 checkpoints on the hub say `h.0`, not `transformer.h.0`; inputs must be quantised all the same."""
    from penjing import transformers_hook

    transformers_hook.install()
    from transformers import AutoModelForCausalLM

    picked = linear(Scheme(grid(8, None), activations=Activations()))
    item = write(Case("native", "gpt2", picked, True), tiny_model("gpt2"), tmp_path)
    ids = torch.arange(3, 23).reshape(1, 20)

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return AutoModelForCausalLM.from_pretrained(item.directory)(ids).logits

    expected = logits()
    path, config = item.directory / "model.safetensors", item.directory / "config.json"
    tensors = {key.removeprefix("transformer."): value for key, value in load_file(path).items()}
    save_file(tensors, path, {"format": "pt"})
    text = config.read_text()
    assert "re:transformer" in text
    config.write_text(text.replace(r"transformer\\.", ""))
    assert torch.equal(logits(), expected)


def test_saving_a_loaded_model_writes_it_dense(tiny_model, tmp_path):
    from penjing import transformers_hook

    transformers_hook.install()
    from transformers import AutoModelForCausalLM

    item = write(Case("native", "llama", linear(Scheme(grid(3, 24)))), tiny_model("llama"), tmp_path)
    model = AutoModelForCausalLM.from_pretrained(item.directory)
    model.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    decoded = load_file(item.decoded / "model.safetensors")
    assert again.keys() == decoded.keys()
    assert all(torch.equal(again[key], decoded[key]) for key in decoded)
    assert "quantization_config" not in (tmp_path / "again" / "config.json").read_text()
