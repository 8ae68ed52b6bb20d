"""The header reader believes nothing: each lie by name, and random damage never gets past CheckpointError."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penjing.checkpoint.safetensors_header import parse_header, read_header
from penjing.errors import CheckpointError

NOWHERE = Path("model.safetensors")
GOOD = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def parse(header, size=32):
    return parse_header(json.dumps(header).encode(), size, NOWHERE)


def changed(name, **entry):
    return {**GOOD, name: {**GOOD[name], **entry}}


def test_good_header():
    header = parse(GOOD)
    assert [(name, spec.shape, spec.dtype, spec.nbytes) for name, spec in header.tensors.items()] == [
        ("a", (2, 3), "float32", 24),
        ("b", (4,), "bfloat16", 8),
    ]
    assert header.metadata == {"format": "pt"}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (changed("b", data_offsets=[24, 40], shape=[8]), "ends at byte 40 of 32"),
        (changed("b", data_offsets=[16, 24]), "overlap"),
        (changed("b", data_offsets=[28, 32], shape=[2]), "4 bytes before tensor 'b' belong to no tensor"),
        (changed("b", data_offsets=[24, 28], shape=[2]), "last 4 bytes belong to no tensor"),
        (changed("b", shape=[5]), "does not take the 8 bytes"),
        (changed("b", shape=[-4]), "not a list of sizes"),
        (changed("b", shape=[True, 4]), "not a list of sizes"),
        (changed("b", shape="4"), "not a list of sizes"),
        (changed("b", data_offsets=[32, 24]), "not a begin and an end"),
        (changed("b", dtype="F13"), "dtype 'F13'"),
        (changed("b", dtype=["F32"]), "dtype"),
        (changed("b", more=1), "must hold dtype, shape and data_offsets"),
        ({**GOOD, "__metadata__": {"format": 1}}, "__metadata__"),
        ([GOOD], "not a JSON object"),
    ],
)
def test_lies(header, message):
    with pytest.raises(CheckpointError, match=message):
        parse(header)


def test_twice_the_same_name():
    raw = b'{"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}, "a": {}}'
    with pytest.raises(CheckpointError, match="twice"):
        parse_header(raw, 1, NOWHERE)


def test_header_length_beyond_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="truncated, or not safetensors"):
        read_header(path)


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_damaged_bytes(data):
    raw = bytearray(json.dumps(GOOD).encode())
    for _ in range(data.draw(st.integers(1, 6))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    try:
        header = parse_header(bytes(raw), 32, NOWHERE)
    except CheckpointError:
        return
    assert sum(spec.nbytes for spec in header.tensors.values()) == 32


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(JSON, st.sampled_from(["dtype", "shape", "data_offsets", "b", "__metadata__"]))
@settings(max_examples=150, deadline=None)
def test_values_of_any_kind(value, where):
    header = {**GOOD, where: value} if where in GOOD else changed("b", **{where: value})
    try:
        parse(header)
    except CheckpointError:
        return


def test_nesting_that_exhausts_the_stack():
    with pytest.raises(CheckpointError, match="not valid JSON"):
        parse_header(b'{"a":' + b"[" * 200_000, 0, NOWHERE)
