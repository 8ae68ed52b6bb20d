"""Directories of safetensors: what is read, and what each kind of damage is called."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from penjing.checkpoint import open_checkpoint
from penjing.checkpoint.safetensors_header import read_header
from penjing.errors import CheckpointError


@pytest.fixture
def copy(tiny_model, tmp_path):
    """A private copy of a tiny model in one file."""
    return shutil.copytree(tiny_model("llama"), tmp_path / "model")


@pytest.fixture
def sharded(tiny_model, tmp_path):
    """A private copy of a tiny model in several files."""
    return shutil.copytree(tiny_model("llama", max_shard_size="100KB"), tmp_path / "model")


def test_tensors_are_those_in_the_file(copy):
    checkpoint = open_checkpoint(copy)
    stored = load_file(copy / "model.safetensors")
    specs = checkpoint.specs()
    assert set(specs) == set(stored)
    for name, tensor in stored.items():
        assert torch.equal(checkpoint.load(name), tensor)
        spec = specs[name]
        assert (spec.shape, spec.dtype, spec.nbytes) == (tuple(tensor.shape), "float32", tensor.nbytes)
    assert checkpoint.label == "model"
    assert checkpoint.config["model_type"] == "llama"


def test_shards_hold_the_same_model(copy, tmp_path, tiny_model):
    one = open_checkpoint(copy)
    many = open_checkpoint(tiny_model("llama", max_shard_size="100KB"))
    assert len(list(many.path.glob("*.safetensors"))) > 2
    assert one.specs() == many.specs()
    assert all(torch.equal(one.load(name), many.load(name)) for name in one.specs())


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int8", "uint8", "float8_e4m3fn", "int64", "bool"])
def test_dtype_names_are_those_of_torch(tmp_path, dtype):
    save_file({"x": torch.ones(3, 5).to(getattr(torch, dtype))}, tmp_path / "x.safetensors")
    spec = read_header(tmp_path / "x.safetensors").tensors["x"]
    assert (spec.shape, spec.dtype, spec.nbytes) == ((3, 5), dtype, 15 * getattr(torch, dtype).itemsize)


def test_files_are_what_else_belongs_to_the_model(copy):
    (copy / "README.md").write_text("a card")
    (copy / "modeling_own.py").write_text("raise SystemExit")
    found = dict(open_checkpoint(copy).files())
    assert set(found) == {"chat_template.jinja", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert found["tokenizer.json"] == (copy / "tokenizer.json").read_bytes()
    assert "modeling_own.py" in dict(open_checkpoint(copy, trust_remote_code=True).files())


def test_fingerprint_follows_contents_and_not_the_place(copy, tmp_path):
    before = open_checkpoint(copy).fingerprint()
    moved = shutil.copytree(copy, tmp_path / "elsewhere")
    assert open_checkpoint(moved).fingerprint() == before
    with (moved / "model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    assert open_checkpoint(moved).fingerprint() != before
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.5}))
    assert open_checkpoint(copy).fingerprint() != before


def test_missing_shard(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(CheckpointError, match=rf"shard {shard.name} is missing \(\d+ tensors\)"):
        open_checkpoint(sharded)


def test_index_that_lies(sharded):
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    shards = sorted(set(content["weight_map"].values()))
    name = next(name for name, shard in content["weight_map"].items() if shard == shards[0])
    content["weight_map"][name] = shards[1]
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"{name}.* is in {shards[1]}, but it is not"):
        open_checkpoint(sharded)
    del content["weight_map"][name]
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"does not list tensor '{name}'"):
        open_checkpoint(sharded)
    content["weight_map"][name] = "../elsewhere.safetensors"
    index.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="outside the directory"):
        open_checkpoint(sharded)


def test_truncated_file(copy):
    file = copy / "model.safetensors"
    data = file.read_bytes()
    for length, message in ((4, "too short"), (100, "truncated"), (len(data) - 5, "truncated")):
        file.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=message):
            open_checkpoint(copy)


def test_pickles_are_refused_and_not_opened(tmp_path, tiny_model):
    shutil.copy(tiny_model("llama") / "config.json", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    with pytest.raises(CheckpointError, match=r"only pytorch_model\.bin.*never unpickled.*save_pretrained"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="never unpickled"):
        open_checkpoint(tmp_path / "pytorch_model.bin")


def test_configs_that_cannot_be_used(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not readable JSON"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no `model_type`"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        open_checkpoint(tmp_path)


def test_remote_code_runs_only_when_asked(copy):
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "home_made", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "configuration_own.py").write_text("raise SystemExit('ran')")
    with pytest.raises(CheckpointError, match="trust_remote_code"):
        open_checkpoint(copy)
    assert open_checkpoint(copy, trust_remote_code=True).config["model_type"] == "home_made"


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_bare_model_is_read_as_the_language_model_it_is(tiny_model, tmp_path, family):
    path = shutil.copytree(tiny_model(family, tied=True), tmp_path / "bare")
    whole = open_checkpoint(tiny_model(family, tied=True))
    prefix = {"gpt2": "transformer.", "llama": "model."}[family]
    tensors = load_file(path / "model.safetensors")
    save_file({name.removeprefix(prefix): tensor for name, tensor in tensors.items()}, path / "model.safetensors")
    bare = open_checkpoint(path)
    assert bare.specs() == whole.specs()
    assert all(torch.equal(bare.load(name), whole.load(name)) for name in whole.specs())


def test_loading_what_is_not_there(copy):
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.nothing'"):
        open_checkpoint(copy).load("model.nothing")


@pytest.mark.parametrize("source", ["./nowhere", "/no/such/model", "nowhere", "a/b/c", "some/model.gguf"])
def test_paths_that_do_not_exist(source):
    with pytest.raises(CheckpointError, match="no such file or directory"):
        open_checkpoint(source)


def test_hub_ids_offline_say_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(CheckpointError, match="some-org/some-model@v2: no such directory here, not in the hub's cache"):
        open_checkpoint("some-org/some-model@v2")


def test_a_local_directory_wins_over_the_hub(copy, monkeypatch):
    (copy.parent / "some-org").mkdir()
    copy.rename(copy.parent / "some-org" / "some-model")
    monkeypatch.chdir(copy.parent)
    assert open_checkpoint("some-org/some-model").label == "some-model"
