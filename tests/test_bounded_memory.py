"""Peak memory is that of one block, whatever the depth of the model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from runs import recipe, texts

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the kernel's high-water mark of memory"),
]

PROGRAM = """
import json, sys
import torch, transformers
from pathlib import Path
from penjing import api
from penjing.pipeline import job
torch.set_num_threads(1)
job.fits_in_memory = lambda parameters: False
def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
model, recipe, output = sys.argv[1:]
api.compress(model, json.loads(recipe), output)
print(peak())
"""
WIDTH = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8, "inner": 1408}
BLOCK = 4 * (4 * 512 * 512 + 3 * 512 * 1408)
"""Bytes of one block in fp32."""

STEPS = {
    "gptq": ({"method": "gptq", "group_size": 32},),
    "shortgpt, awq": ({"method": "shortgpt", "drop": 1}, {"method": "awq", "group_size": 32, "steps": 2}),
}


@pytest.mark.parametrize("name", STEPS)
def test_a_deeper_model_takes_no_more_memory(name: str, tiny_model, tmp_path) -> None:
    short = texts(tmp_path / "texts")
    wanted = json.dumps(recipe(short, *STEPS[name], format="native"))
    peaks = []
    for layers in (4, 12):
        model = tiny_model("llama", layers=layers, **WIDTH)
        command = [sys.executable, "-c", PROGRAM, str(model), wanted, str(tmp_path / str(layers))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout.split()[-1]))
    shallow, deep = peaks
    # eight more blocks are 103 MB; what may grow with depth is bookkeeping, not weights
    assert deep - shallow < 4 * BLOCK, f"{shallow / 1e6:.0f} MB with 4 blocks, {deep / 1e6:.0f} MB with 12"
    assert deep < 1.1 * shallow
