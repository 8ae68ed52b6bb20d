"""Whole files with damaged headers: an answer or a CheckpointError, quickly, and without taking memory."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from penjing.checkpoint import open_checkpoint
from penjing.errors import PenjingError
from penjing.models import layout_of

MEMORY, SECONDS = 60e6, 5.0
SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

DAMAGE = st.lists(
    st.one_of(
        st.tuples(st.just("byte"), st.floats(0, 1), st.integers(0, 255)),
        st.tuples(st.just("number"), st.floats(0, 1), st.sampled_from([0, 1, 2**31 - 1, 2**40, 2**63, 2**64 - 1])),
        st.tuples(st.just("cut"), st.floats(0, 1), st.just(0)),
        st.tuples(st.just("again"), st.floats(0, 1), st.integers(1, 64)),
    ),
    min_size=1,
    max_size=4,
)
"""What is done to a file, and where in its header as a fraction of it."""


def damaged(raw: bytes, header: int, damage: list[tuple[str, float, int]]) -> bytes:
    data = bytearray(raw)
    for what, where, value in damage:
        at = int(where * min(header, max(len(data) - 8, 0)))
        if what == "byte" and data:
            data[min(at, len(data) - 1)] = value
        elif what == "number":
            data[at : at + 8] = struct.pack("<Q", value)
        elif what == "cut":
            del data[at:]
        else:
            data[at:at] = data[at : at + value]
    return bytes(data)


def survives(path: Path) -> None:
    """Opening, describing and reading a tensor end in a result or in one of our errors."""
    began = time.perf_counter()
    tracemalloc.start()
    try:
        checkpoint = open_checkpoint(path)
        layout_of(checkpoint.config, checkpoint.specs())
        for name in list(checkpoint.specs())[:2]:
            checkpoint.load(name)
    except PenjingError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MEMORY
    assert time.perf_counter() - began < SECONDS * 10  # a hang, not a slow machine


@pytest.fixture(scope="module")
def small_gguf(tiny_model, tmp_path_factory) -> bytes:
    """The smallest file: one block, its tokenizer's lists are most of the header."""
    pytest.importorskip("gguf")
    from penjing.formats.gguf.assembly import convert

    checkpoint = open_checkpoint(tiny_model("llama", layers=1))
    return convert(checkpoint, layout_of(checkpoint.config), tmp_path_factory.mktemp("x"), torch.float16).read_bytes()


@given(damage=DAMAGE)
@example(damage=[("number", 8 / 1000, 2**40)])
@SETTINGS
def test_gguf_files(small_gguf, tmp_path, damage):
    path = tmp_path / "x.gguf"
    path.write_bytes(damaged(small_gguf, small_gguf.find(b"blk.0.ffn_down") + 500, damage))
    survives(path)


@given(damage=DAMAGE)
@SETTINGS
def test_safetensors_files(tiny_model, tmp_path, damage):
    source = tiny_model("llama", layers=1)
    directory = tmp_path / "model"
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_bytes((source / "config.json").read_bytes())
    raw = (source / "model.safetensors").read_bytes()
    (directory / "model.safetensors").write_bytes(damaged(raw, 8 + struct.unpack("<Q", raw[:8])[0], damage))
    survives(directory)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2**40),
    st.floats(),
    st.text(max_size=4),
    st.lists(st.integers(), max_size=2),
)


@given(st.data())
@SETTINGS
def test_configs_of_quantised_models(tiny_model, tmp_path, data):
    """What an export reads before it writes: config.json of each format, with a value of any kind in some place."""
    from penjing import export

    directory = tmp_path / "model"
    directory.mkdir(exist_ok=True)
    told = json.loads((tiny_model("llama", layers=1) / "config.json").read_text())
    quantised = data.draw(st.sampled_from(list(CONFIGS)))
    entries = dict(CONFIGS[quantised])
    entries[data.draw(st.sampled_from(sorted(entries)))] = data.draw(VALUES)
    told["quantization_config"] = entries
    (directory / "config.json").write_text(json.dumps(told))
    (directory / "model.safetensors").write_bytes(save({"model.norm.weight": torch.ones(64)}))
    with pytest.raises(PenjingError):
        export(directory, "onnx", tmp_path / "out")


CONFIGS = {
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True, "desc_act": False},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True, "version": "gemm"},
    "nf4": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_threshold": 6.0},
    "onnx": {"quant_method": "penjing-onnx", "version": 1, "schemes": []},
}
