"""Bad input: a PenjingError that names it, exit code and one line through the command line, nothing half written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from penjing import api, cli
from penjing.errors import (
    CalibrationError,
    CheckpointError,
    FormatError,
    OutputError,
    PenjingError,
    PlanError,
    QualityError,
)
from runs import compress, recipe, shards, texts

RTN = {"method": "rtn", "group_size": 32}
GPTQ = {"method": "gptq", "group_size": 32}
Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def short(tmp_path: Path) -> dict[str, Any]:
    return texts(tmp_path / "texts")


@pytest.fixture
def model(tiny_model, tmp_path) -> Path:
    """A copy that may be damaged, in several shards."""
    return Path(shutil.copytree(tiny_model("llama", max_shard_size="100KB"), tmp_path / "model"))


def shard_of(model: Path, tensor: str) -> Path:
    return model / json.loads((model / "model.safetensors.index.json").read_text())["weight_map"][tensor]


def edit(model: Path, name: str, change: Callable[[torch.Tensor], object]) -> None:
    path = shard_of(model, name)
    tensors = load_file(path)
    change(tensors[name])
    save_file(tensors, path, {"format": "pt"})


def missing_shard(model: Path) -> None:
    shard_of(model, Q).unlink()


def truncated_shard(model: Path) -> None:
    path = shard_of(model, Q)
    os.truncate(path, path.stat().st_size // 2)


def lying_header(model: Path) -> None:
    path = shard_of(model, Q)
    content = path.read_bytes()
    path.write_bytes(content.replace(b"[64,64]", b"[64,65]"))


def index_that_lies(model: Path) -> None:
    path = model / "model.safetensors.index.json"
    path.write_text(path.read_text().replace(Q, Q.replace("q_proj", "r_proj")))


def pickle_only(model: Path) -> None:
    for path in model.glob("*.safetensors*"):
        path.unlink()
    (model / "pytorch_model.bin").write_bytes(b"\x80\x04")


def config(**changes: Any) -> Callable[[Path], None]:
    def change(model: Path) -> None:
        path = model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return change


def own_code(model: Path) -> None:
    config(model_type="bonsai", auto_map={"AutoModelForCausalLM": "modeling.Bonsai"})(model)


def no_tokenizer(model: Path) -> None:
    for path in model.glob("token*"):
        path.unlink()


DAMAGE: dict[str, tuple[type[PenjingError], str, Callable[[Path], object]]] = {
    "missing shard": (CheckpointError, r"shard .* is missing", missing_shard),
    "truncated shard": (CheckpointError, r"truncated", truncated_shard),
    "header that lies": (CheckpointError, r"does not take the 16384 bytes", lying_header),
    "index that lies": (CheckpointError, r"r_proj", index_that_lies),
    "NaN": (CheckpointError, rf"{Q} .*NaN", lambda model: edit(model, Q, lambda rows: rows[0, 0].fill_(torch.nan))),
    "infinity": (
        CheckpointError,
        rf"{Q} .*infin",
        lambda model: edit(model, Q, lambda rows: rows[3].fill_(torch.inf)),
    ),
    "overflow": (
        CalibrationError,
        r"NaN or infinite",
        lambda model: edit(model, "model.layers.0.mlp.down_proj.weight", lambda weight: weight.fill_(3e38)),
    ),
    "pickle": (CheckpointError, r"never unpickled", pickle_only),
    "no config": (CheckpointError, r"no config.json", lambda model: (model / "config.json").unlink()),
    "broken config": (CheckpointError, r"not readable JSON", lambda model: (model / "config.json").write_text("{")),
    "config of another model": (CheckpointError, r"has shape .* config implies", config(intermediate_size=128)),
    "more layers than weights": (CheckpointError, r"lacks tensors", config(num_hidden_layers=3)),
    "unknown architecture": (CheckpointError, r"cannot build", config(model_type="nothing-like-it")),
    "own code": (CheckpointError, r"trust_remote_code", own_code),
    "no tokenizer": (CalibrationError, r"no tokenizer", no_tokenizer),
    "dtype": (PlanError, r"cannot be written", config(dtype="float8_e4m3fn")),
}


@pytest.mark.parametrize("step", [RTN, GPTQ], ids=["rtn", "gptq"])
@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_model(name: str, step: dict[str, Any], model: Path, short, tmp_path, capsys) -> None:
    error, words, damage = DAMAGE[name]
    damage(model)
    output = tmp_path / "out"
    with pytest.raises(error, match=words):
        compress(model, recipe(short, step), output)
    assert not list(output.rglob("*.tmp"))
    assert not (output / "config.json").exists(), "what is there must not look like a model"
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(short, step)))
    code = cli.main(["compress", str(model), "-r", str(tmp_path / "recipe.yaml"), "-o", str(output)])
    told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert code == error.exit_code == 2
    assert len(told) == 1


def test_a_value_that_the_storage_dtype_cannot_hold(model: Path, short, tmp_path) -> None:
    edit(model, "model.layers.0.input_layernorm.weight", lambda weight: weight[0].fill_(1e6))
    with pytest.raises(FormatError, match=r"input_layernorm.weight does not fit torch.float16.*bfloat16"):
        compress(model, recipe(short, RTN, dtype="float16"), tmp_path / "out")


def test_a_compressed_model_is_not_compressed_again(model: Path, short, tmp_path) -> None:
    compress(model, recipe(short, RTN), tmp_path / "once", evaluated=False)
    with pytest.raises(PlanError, match="already compressed"):
        compress(tmp_path / "once", recipe(short, RTN), tmp_path / "twice")


def test_empty_and_short_text(model: Path, short, tmp_path) -> None:
    data = Path(short["calibration"]["data"])
    for content, words in (("  \n", "no text found"), ("A pine.", "tokens found")):
        data.write_text(content)
        with pytest.raises(CalibrationError, match=words):
            compress(model, recipe(short, GPTQ), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_with_fewer_positions_than_the_probe(tiny_model, short, tmp_path) -> None:
    few = tiny_model("gpt2", n_positions=32)
    report = compress(few, recipe(short, {"method": "rtn"}, format="native"), tmp_path / "out")
    assert report.verification["passed"]


def test_a_missing_recipe(model: Path, tmp_path, capsys) -> None:
    assert cli.main(["compress", str(model), "-r", str(tmp_path / "no.yaml"), "-o", str(tmp_path / "out")]) == 2
    assert "no recipe file" in capsys.readouterr().err


@pytest.mark.parametrize("limit", [{"max_kl": 1e-9}, {"max_perplexity_ratio": 1e-3}, {"max_bytes": 10}])
def test_limits(limit: dict[str, float], model: Path, short, tmp_path) -> None:
    with pytest.raises(QualityError, match=r"allows"):
        compress(model, recipe(short, {"method": "rtn", "bits": 2, "group_size": 32}, require=limit), tmp_path / "out")
    assert (tmp_path / "out" / "report.json").is_file(), "the report says how far off it is"
    assert QualityError.exit_code == 4


def test_vocabularies_that_differ(model: Path, tiny_model, short) -> None:
    other = tiny_model("llama", vocab_size=320)
    with pytest.raises(PlanError, match="vocabulary of 320"):
        api.compare([model, other], **short["evaluation"])


def test_interrupted_from_the_keyboard(model: Path, short, tmp_path, monkeypatch, capsys) -> None:
    from penjing.pipeline import walk

    def interrupt(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe(short, RTN)))
    arguments = ["compress", str(model), "-r", str(tmp_path / "recipe.yaml"), "-o", str(tmp_path / "out")]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # workers of a parallel test run ignore it
    try:
        with monkeypatch.context() as patch:
            patch.setattr(walk.Walk, "_block", interrupt)
            assert cli.main(arguments) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert "interrupted" in capsys.readouterr().err
    for folder in ("whole", "out"):
        assert cli.main([*arguments[:-1], str(tmp_path / folder)]) == 0
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def test_a_full_disk(model: Path, short, tmp_path) -> None:
    """The limit on the size of a file stands in for the disk: the same kind of error from the same call."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, before[1]))
        with pytest.raises(OutputError, match=r"the disk is full: .* needed"):
            compress(model, recipe(short, RTN), tmp_path / "out", evaluated=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list((tmp_path / "out").rglob("*.tmp"))
    compress(model, recipe(short, RTN), tmp_path / "out", evaluated=False)
    compress(model, recipe(short, RTN), tmp_path / "whole", evaluated=False)
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def test_too_little_space_is_noticed_before_the_work(model: Path, short, tmp_path, monkeypatch) -> None:
    from penjing.pipeline import walk

    monkeypatch.setattr(walk.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    with pytest.raises(OutputError, match="free and the run needs"):
        compress(model, recipe(short, RTN), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.safetensors"))


CUSTOM = """
from transformers import LlamaConfig, LlamaForCausalLM

class BonsaiConfig(LlamaConfig):
    model_type = "bonsai"

class Bonsai(LlamaForCausalLM):
    config_class = BonsaiConfig
"""


@pytest.mark.slow
def test_a_model_with_its_own_code_when_trusted(model: Path, short, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (model / "bonsai.py").write_text(CUSTOM)
    auto = {"AutoConfig": "bonsai.BonsaiConfig", "AutoModelForCausalLM": "bonsai.Bonsai"}
    config(model_type="bonsai", auto_map=auto, architectures=["Bonsai"])(model)
    wanted = recipe(short, GPTQ, format="native")
    report = compress(model, wanted, tmp_path / "out", engine=True, trust_remote_code=True)
    assert report.verification["how"] == "transformers"
