"""Bytes and time."""

from __future__ import annotations

import time

import pytest

from penjing.evaluation.size import Stages, bits_per_weight, readable_bytes, weight_bytes


def test_only_weight_files_count(tmp_path):
    (tmp_path / "model-00001-of-00002.safetensors").write_bytes(b"x" * 100)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"x" * 50)
    (tmp_path / "tokenizer.json").write_bytes(b"x" * 1000)
    assert weight_bytes(tmp_path) == 150
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"x" * 7)
    assert weight_bytes(gguf) == 7


def test_bits_per_weight():
    assert bits_per_weight(100, 200) == 4.0


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (81_300_000, "81.3 MB"), (2.5e12, "2.50 TB")]
)
def test_readable_bytes(count, text):
    assert readable_bytes(count) == text


def test_stages_add_up_and_survive_an_error():
    stages = Stages()
    for _ in range(2):
        with stages.stage("work"):
            time.sleep(0.01)
    with pytest.raises(KeyError), stages.stage("fail"):
        raise KeyError
    assert stages.seconds["work"] >= 0.02 and "fail" in stages.seconds
