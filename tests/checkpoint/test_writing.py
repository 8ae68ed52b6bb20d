"""Writing is all or nothing."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

from penjing.checkpoint import open_checkpoint, write_bytes, write_index, write_shard
from penjing.errors import OutputError

TENSORS = {"b": torch.arange(6.0).reshape(2, 3).T, "a": torch.ones(4, dtype=torch.bfloat16)}


def test_shard_round_trip_and_same_bytes_every_time(tmp_path):
    metadata = dict.fromkeys("abcdefgh", "x")
    write_shard(tmp_path / "one.safetensors", TENSORS, metadata)
    write_shard(tmp_path / "two.safetensors", dict(reversed(TENSORS.items())), dict(reversed(metadata.items())))
    loaded = load_file(tmp_path / "one.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.safetensors", "two.safetensors"]


def test_same_bytes_in_another_process(tmp_path):
    script = (
        "import sys, torch; from pathlib import Path; from penjing.checkpoint import write_shard;"
        "write_shard(Path(sys.argv[1]), {'w': torch.ones(3)}, {key: 'x' for key in 'abcdefgh'})"
    )
    for name in ("one", "two"):
        subprocess.run([sys.executable, "-c", script, str(tmp_path / name)], check=True)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize("dtype", ["float64", "float16", "float8_e4m3fn", "int8", "uint8", "bool", "int64"])
def test_every_dtype_is_read_back_by_safetensors(tmp_path, dtype):
    tensors = {
        "matrix": torch.arange(6).reshape(2, 3).to(getattr(torch, dtype)),
        "scalar": torch.ones((), dtype=getattr(torch, dtype)),
        "empty": torch.ones(0, 3, dtype=getattr(torch, dtype)),
    }
    write_shard(tmp_path / "x.safetensors", tensors)
    loaded = load_file(tmp_path / "x.safetensors")
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].to(torch.float64), tensor.to(torch.float64))


def test_index_makes_shards_one_checkpoint(tmp_path):
    shards = {"model-1.safetensors": ["b"], "model-2.safetensors": ["a"]}
    for shard, names in shards.items():
        write_shard(tmp_path / shard, {name: TENSORS[name] for name in names})
    write_index(tmp_path, shards, 32)
    write_bytes(tmp_path / "config.json", b'{"model_type": "llama"}')
    assert set(open_checkpoint(tmp_path).specs()) == {"a", "b"}
    assert json.loads((tmp_path / "model.safetensors.index.json").read_text())["metadata"] == {"total_size": 32}


def test_bytes_are_replaced_and_directories_made(tmp_path):
    path = tmp_path / "deep" / "er" / "file.json"
    write_bytes(path, b"old")
    write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert [entry.name for entry in path.parent.iterdir()] == ["file.json"]


@pytest.fixture
def small_disk():
    """No file of this process may grow beyond 64 KiB, which fails a write the way a full disk does."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def test_full_disk_leaves_nothing_behind(tmp_path, small_disk):
    with pytest.raises(OutputError, match=r"the disk is full: 4,000,1\d\d bytes needed, [\d,]+ free"):
        write_shard(tmp_path / "big.safetensors", {"w": torch.zeros(1_000_000)})
    with pytest.raises(OutputError, match="the disk is full: 100,000 bytes needed"):
        write_bytes(tmp_path / "big.json", b" " * 100_000)
    assert list(tmp_path.iterdir()) == []


def test_full_disk_keeps_the_old_file(tmp_path, small_disk):
    write_bytes(tmp_path / "file.json", b"old")
    with pytest.raises(OutputError):
        write_bytes(tmp_path / "file.json", b" " * 100_000)
    assert (tmp_path / "file.json").read_bytes() == b"old"


def test_a_file_in_place_of_the_directory(tmp_path):
    (tmp_path / "out").write_text("in the way")
    with pytest.raises(OutputError, match="cannot be written"):
        write_bytes(tmp_path / "out" / "config.json", b"{}")
