"""Kill it anywhere, run it again: the same bytes. What decides the bytes and has changed is refused by name."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from penjing import api
from penjing.errors import OutputError, ResumeError
from penjing.pipeline import walk
from penjing.pipeline.journal import FOLDER, alone_in
from runs import Killed, compress, recipe, shards, texts

HYBRID = (
    {"method": "shortgpt", "drop": 1},
    {"method": "wanda", "sparsity": 0.25},
    {"method": "gptq", "bits": 4, "group_size": 32},
)
ASYMMETRIC = ({"method": "gptq", "bits": 3, "group_size": 32, "asymmetric": True, "targets": ["*.mlp.*", "lm_head"]},)
"""The dense model's hidden states have to be where they were."""

STREAM = ({"method": "gptq", "bits": 3, "group_size": 32, "asymmetric": True, "stream": True},)
"""So do they here, and the gradients of the dense model, and the text that it writes."""
TWO_SIDED = [{**STREAM[0], "two_sided": True}]

ROTATED = ({"method": "rotation"}, {"method": "gptq", "bits": 4, "group_size": 32})
AWQ = ({"method": "awq", "bits": 4, "group_size": 32, "steps": 2},)
LAYERS = 4


@pytest.fixture
def short(tmp_path: Path) -> dict[str, Any]:
    return texts(tmp_path / "texts")


def kill_after(monkeypatch: pytest.MonkeyPatch, count: int, before: bool) -> None:
    """Stop at shard `count`: before anything of it is written, or between its file and the journal's note of it."""
    written = 0
    write = walk.write_shard

    def killing(path: Path, *args: Any) -> None:
        nonlocal written
        written += 1
        if before and written == count:
            raise Killed
        write(path, *args)
        if written == count:
            raise Killed

    monkeypatch.setattr(walk, "write_shard", killing)


@pytest.mark.parametrize(
    ("steps", "propagate", "calibration"),
    [
        (HYBRID, "compressed", {}),
        (AWQ, "original", {}),
        (ROTATED, "compressed", {}),
        (ASYMMETRIC, "compressed", {}),
        (STREAM, "compressed", {"token_weights": "gradient", "written": 0.5}),
        (TWO_SIDED, "compressed", {"token_weights": "gradient"}),
    ],
    ids=["hybrid", "awq", "rotated", "asymmetric", "stream", "two-sided"],
)
def test_stopped_at_every_shard(steps, propagate, calibration, tiny_model, short, tmp_path, monkeypatch) -> None:
    model = tiny_model("llama", layers=LAYERS)
    short["calibration"] |= calibration
    wanted = recipe(short, *steps, propagate=propagate)
    report = compress(model, wanted, tmp_path / "whole", evaluated=False)
    expected = shards(tmp_path / "whole")
    numbered = len([name for name in expected if name.endswith(".safetensors")])
    for count in range(1, numbered + 1):
        for before in (True, False):
            output = tmp_path / f"{count}{before}"
            with monkeypatch.context() as patch, pytest.raises(Killed):
                kill_after(patch, count, before)
                compress(model, wanted, output, evaluated=False)
            again = compress(model, wanted, output, evaluated=False)
            assert shards(output) == expected, f"stopped {'before' if before else 'after'} shard {count}"
            assert again.modules == report.modules and again.block_errors == report.block_errors


def test_finished_shards_are_not_made_again(tiny_model, short, tmp_path, monkeypatch) -> None:
    model, wanted = tiny_model("llama", layers=LAYERS), recipe(short, *AWQ)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 4, before=True)
        compress(model, wanted, tmp_path / "out")
    made: list[str] = []
    write = walk.write_shard
    monkeypatch.setattr(walk, "write_shard", lambda path, tensors: made.append(path.name) or write(path, tensors))
    compress(model, wanted, tmp_path / "out")
    assert made == [f"model-{number:05d}-of-00006.safetensors" for number in (4, 5, 6)]


def test_a_second_run_is_kept_out(tiny_model, short, tmp_path) -> None:
    """While one is at work, and no longer: its end leaves nothing behind that would stop the next."""
    model, wanted, output = (
        tiny_model("llama"),
        recipe(short, {"method": "rtn", "bits": 4, "group_size": 32}),
        tmp_path / "out",
    )
    with alone_in(output), pytest.raises(OutputError, match="another run of penjing is at work in"):
        compress(model, wanted, output, evaluated=False)
    assert not list(output.iterdir())
    compress(model, wanted, output, evaluated=False)
    assert (output / "report.json").is_file()


def start(model: Path, wanted: dict[str, Any], folder: Path, output: Path) -> subprocess.Popen[bytes]:
    """`penjing compress` in a process of its own."""
    (folder / "recipe.yaml").write_text(yaml.safe_dump(wanted))
    command = [sys.executable, "-m", "penjing", "compress", str(model), "-r", str(folder / "recipe.yaml")]
    return subprocess.Popen(
        [*command, "-o", str(output), "--no-eval"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=os.environ
    )


def finished(output: Path) -> int:
    """Shards that the journal knows; it is replaced in one piece, so it can always be read."""
    journal = output / FOLDER / "journal.json"
    return len(json.loads(journal.read_text())["shards"]) if journal.is_file() else -1


def kill_when(process: subprocess.Popen[bytes], ready: Callable[[], bool]) -> bool:
    """SIGKILL as soon as `ready`; False if the process ended before."""
    while process.poll() is None:
        if ready():
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return True
        time.sleep(0.001)
    process.communicate()
    return False


@pytest.mark.slow
def test_a_process_killed_again_and_again_gives_the_same_bytes(tiny_model, short, tmp_path) -> None:
    """SIGKILL when one more shard is in the journal, then while a file is being written, until the run is through."""
    model = tiny_model("llama", layers=LAYERS, hidden_size=256, inner=512)
    wanted = recipe(short, *AWQ)
    output = tmp_path / "out"
    kills = 0
    for round in range(4):
        process = start(model, wanted, tmp_path, output)
        before = finished(output)
        by_shard = round % 2 == 0

        def ready(by_shard: bool = by_shard, before: int = before) -> bool:
            half_written = any(output.glob(".*.tmp")) or any(output.glob(f"{FOLDER}/.*.tmp"))
            return finished(output) > before if by_shard else half_written

        if not kill_when(process, ready):
            assert process.returncode == 0, "the resumed run failed"
            break
        kills += 1
    else:
        done = start(model, wanted, tmp_path, output)
        _, error = done.communicate()
        assert done.returncode == 0, error.decode()
    assert kills >= 2
    process = start(model, wanted, tmp_path, tmp_path / "whole")
    _, error = process.communicate()
    assert process.returncode == 0, error.decode()
    assert shards(output) == shards(tmp_path / "whole")
    assert not list(output.rglob(".*.tmp"))


@pytest.mark.parametrize("left", [(), (f"{FOLDER}/",), (f"{FOLDER}/", f"{FOLDER}/.journal.json.123.tmp")])
def test_killed_before_the_first_note(left, tiny_model, short, tmp_path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    for name in left:
        (output / name).mkdir() if name.endswith("/") else (output / name).write_bytes(b"{")
    compress(tiny_model("llama"), recipe(short, *AWQ), output, evaluated=False)
    assert api.verify(output).tensors > 0 if left == () else (output / "report.json").is_file()
    assert not list(output.rglob(".*.tmp"))


def test_killed_between_the_walk_and_the_report(tiny_model, short, tmp_path, monkeypatch) -> None:
    from penjing.pipeline import job, stages

    model, wanted = tiny_model("llama"), recipe(short, *AWQ)
    compress(model, wanted, tmp_path / "whole", evaluated=False)
    moments = {"write_index": stages, "save_probe": stages, "verify": job, "model_card": job}
    for stage, module in moments.items():

        def stop(*_: object, **__: object) -> None:
            raise Killed

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(module, stage, stop)
            compress(model, wanted, tmp_path / stage, evaluated=False)
        compress(model, wanted, tmp_path / stage, evaluated=False)
        assert shards(tmp_path / stage) == shards(tmp_path / "whole")


def interrupted(model: Path, wanted: dict[str, Any], output: Path) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_after(patch, 2, before=False)
        compress(model, wanted, output, evaluated=False)


def test_a_changed_recipe_is_named(tiny_model, short, tmp_path) -> None:
    model, wanted = tiny_model("llama"), recipe(short, *AWQ)
    interrupted(model, wanted, tmp_path / "out")
    with pytest.raises(ResumeError, match=r"another recipe: recipe was \w+, is \w+"):
        compress(model, recipe(short, AWQ[0] | {"bits": 3}), tmp_path / "out")


def test_what_does_not_change_the_bytes_may_change(tiny_model, short, tmp_path) -> None:
    model, wanted = tiny_model("llama"), recipe(short, *AWQ)
    compress(model, wanted, tmp_path / "whole", evaluated=False)
    interrupted(model, wanted, tmp_path / "out")
    compress(model, wanted | {"summary": "another", "require": {"max_bytes": 10**9}}, tmp_path / "out", evaluated=False)
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def test_changed_data_is_named(tiny_model, short, tmp_path) -> None:
    model, wanted = tiny_model("llama"), recipe(short, *AWQ)
    interrupted(model, wanted, tmp_path / "out")
    data = Path(short["calibration"]["data"])
    data.write_text(data.read_text().replace("pine", "fir"))
    with pytest.raises(ResumeError, match="another data"):
        compress(model, wanted, tmp_path / "out")


def test_a_changed_model_is_named(tiny_model, short, tmp_path) -> None:
    wanted = recipe(short, *AWQ)
    interrupted(tiny_model("llama"), wanted, tmp_path / "out")
    with pytest.raises(ResumeError, match="another model"):
        compress(tiny_model("llama", seed=1), wanted, tmp_path / "out")


def test_a_harmed_shard_is_named(tiny_model, short, tmp_path) -> None:
    model, wanted = tiny_model("llama"), recipe(short, *AWQ)
    interrupted(model, wanted, tmp_path / "out")
    shard = next((tmp_path / "out").glob("model-00001*"))
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ResumeError, match=r"model-00001-of-00004\.safetensors is not what this run wrote"):
        compress(model, wanted, tmp_path / "out")


def test_a_finished_run_is_not_written_over(tiny_model, short, tmp_path) -> None:
    model, wanted = tiny_model("llama"), recipe(short, *AWQ)
    compress(model, wanted, tmp_path / "out", evaluated=False)
    before = shards(tmp_path / "out")
    with pytest.raises(OutputError, match="choose another output"):
        compress(model, wanted, tmp_path / "out", evaluated=False)
    assert shards(tmp_path / "out") == before
