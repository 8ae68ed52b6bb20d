"""Export holds one block and the largest tensor, whatever the depth of the model and the format."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from penjing.memory import PeakMemory

pytestmark = pytest.mark.slow

PROGRAM = """
import json, sys
from pathlib import Path
import torch, transformers
import penjing
from penjing.pipeline import export
torch.set_num_threads(1)
export.fits_in_memory = lambda parameters: False
first, *models = sys.argv[2:]
format, work = json.loads(sys.argv[1])
peaks = []
for number, model in enumerate([first, *models]):  # the first brings in what is imported on the way
    peaks.append(penjing.export(model, format, Path(work) / str(number)).peak_memory)
print(json.dumps(peaks[1:]))
"""
WIDTH = {"hidden_size": 512, "num_attention_heads": 8, "num_key_value_heads": 8, "inner": 1408}
BLOCK = 4 * (4 * 512 * 512 + 3 * 512 * 1408)
LARGEST = 4 * 512 * 1408
SLACK = BLOCK
"""Bytes of one block and of its largest tensor in fp32, and what is left for copies of a tensor on its way into the
file, activations, and what the heap keeps."""

FORMATS = {"gguf": "gguf", "onnx": "onnxruntime", "native": "torch", "dense": "torch"}
"""And the package that writing needs."""


@pytest.mark.parametrize("format", FORMATS)
def test_a_deeper_model_takes_no_more_memory(format, tiny_model, tmp_path):
    pytest.importorskip(FORMATS[format])
    with PeakMemory() as memory:
        pass
    if not memory.exact:
        pytest.skip("this system does not let a process reset its memory mark")
    models = [tiny_model("llama"), *(tiny_model("llama", layers=layers, **WIDTH) for layers in (3, 10))]
    command = [sys.executable, "-c", PROGRAM, json.dumps([format, str(tmp_path)]), *map(str, models)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    shallow, deep = json.loads(done.stdout.splitlines()[-1])
    assert deep < shallow + BLOCK / 2
    assert deep < BLOCK + LARGEST + SLACK
