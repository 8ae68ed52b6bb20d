"""Metadata of any kind in a GGUF file: a model, or a CheckpointError; no other exception, hang, or much memory."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from penjing.checkpoint import gguf_file, open_checkpoint
from penjing.checkpoint.gguf_header import read_gguf_header
from penjing.errors import PenjingError
from penjing.formats.gguf.assembly import convert
from penjing.models import layout_of

pytest.importorskip("gguf")

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([0, 1, -1, 3, 2**31, 2**63]),
    st.floats(width=32),
    st.sampled_from(["", "yarn", "linear", "longrope", "gpt2", "\x00"]),
    st.lists(st.integers(-5, 5), max_size=3),
    st.lists(st.text(max_size=2), max_size=3),
)


@pytest.fixture(scope="module")
def files(tiny_model, tmp_path_factory):
    paths = []
    for family in ("llama", "gemma2", "phi3"):
        checkpoint = open_checkpoint(tiny_model(family))
        directory = tmp_path_factory.mktemp("fuzz") / family
        paths.append(convert(checkpoint, layout_of(checkpoint.config), directory, torch.float32))
    return paths


@given(st.data())
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_values_of_any_kind(files, data):
    path = data.draw(st.sampled_from(files))
    header = read_gguf_header(path)
    keys = {key: value for key, value in header.keys.items() if not key.startswith("tokenizer")}
    keys |= {"general.alignment": 32, "tokenizer.ggml.bos_token_id": 1}
    prefix = keys["general.architecture"]
    keys |= {f"{prefix}.rope.scaling.type": "linear", f"{prefix}.rope.scaling.factor": 2.0}
    for name in data.draw(st.lists(st.sampled_from(sorted(keys)), min_size=1, max_size=2, unique=True)):
        keys[name] = data.draw(VALUES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gguf_file, "read_gguf_header", lambda _: replace(header, keys=keys))
        tracemalloc.start()
        try:
            checkpoint = gguf_file.GGUFCheckpoint(path)
            layout_of(checkpoint.config, checkpoint.specs())
        except PenjingError:
            pass
        finally:
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
    assert peak < 50e6
