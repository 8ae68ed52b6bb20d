"""Windows that the model writes itself: how many, where they stand, what is kept of them and what is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from penjing import api, costs
from penjing.checkpoint import open_checkpoint
from penjing.errors import RecipeError
from penjing.evaluation.windows import token_digest
from penjing.models import layout_of
from penjing.pipeline import job, written_text
from penjing.pipeline.journal import FOLDER
from penjing.pipeline.text import TextSource
from penjing.pipeline.written_text import calibration_text, write_windows
from penjing.recipe import Calibration, load_recipe
from runs import LENGTH, SAMPLES, compress, recipe, shards, stopped_before_the_walk, texts

GPTQ = {"method": "gptq", "bits": 3, "group_size": 32}


@pytest.fixture
def short(tmp_path: Path) -> dict[str, Any]:
    return texts(tmp_path / "texts")


def silent(*_: object) -> None:
    pass


def test_given_and_written_windows_stand_among_one_another(tiny_model: Any, short: dict[str, Any]) -> None:
    checkpoint = open_checkpoint(tiny_model("llama"))
    wanted = Calibration(**short["calibration"], written=0.5)
    mixed, given = calibration_text(checkpoint, wanted, silent), TextSource(checkpoint).calibration(wanted)
    written = write_windows(TextSource(checkpoint), wanted, torch.float32, silent)
    assert given.tokens.shape == written.shape == (SAMPLES // 2, LENGTH)
    assert torch.equal(mixed.tokens[::2], given.tokens)
    assert mixed.tokens.shape == (SAMPLES, LENGTH)
    assert mixed.protocol.corpus == "calibration.txt and 2 windows of text that the model wrote"
    assert mixed.protocol.token_hash == token_digest(mixed.tokens)
    assert mixed.protocol.scored == SAMPLES * (LENGTH - 1)
    few = wanted.model_copy(update={"written": 0.25})
    assert [len(TextSource(checkpoint).calibration(few).tokens), few.own_windows] == [3, 1]


def test_texts_fill_windows_and_differ_by_seed(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    source = TextSource(open_checkpoint(tiny_model("llama")))
    wanted, said = Calibration(samples=3, length=20, written=1), []
    for name, value in {"WRITTEN_LENGTH": 8, "WRITTEN_TOGETHER": 4}.items():
        monkeypatch.setattr(written_text, name, value)
    found = write_windows(source, wanted, torch.float32, lambda *told: said.append(told[:3]))
    assert found.shape == (3, 20) and len({tuple(row) for row in found.tolist()}) == 3
    assert said[0] == ("write text", 0, 9) and said[-1] == ("write text", 9, 9)
    assert [done for _, done, _ in said] == sorted(done for _, done, _ in said)
    other = write_windows(source, wanted.model_copy(update={"seed": 1}), torch.float32, silent)
    assert not torch.equal(found, other)


def test_every_text_begins_as_the_tokenizer_begins_texts(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TextSource, "bos", 1)
    monkeypatch.setattr(written_text, "WRITTEN_LENGTH", 8)
    source = TextSource(open_checkpoint(tiny_model("llama")))
    found = write_windows(source, Calibration(samples=2, length=16, written=1), torch.float32, silent)
    assert (found[:, ::8] == 1).all()


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_a_run_says_what_it_calibrated_on_and_leaves_nothing(
    share: float, tiny_model: Any, short: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model("llama")
    plain = short["calibration"]
    short["calibration"] = plain | {"written": share}
    if share == 1:
        del short["calibration"]["data"]
    report = compress(model, recipe(short, GPTQ), tmp_path / "mixed", evaluated=share < 1)
    assert report.calibration is not None and report.calibration.windows == SAMPLES
    assert report.calibration.corpus.endswith("text that the model wrote")
    assert report.sample
    assert not list((tmp_path / "mixed" / FOLDER).glob("written*"))
    assert "the model wrote" in (tmp_path / "mixed" / "README.md").read_text(encoding="utf-8")
    compress(model, recipe(short | {"calibration": plain}, GPTQ), tmp_path / "plain", evaluated=False)
    assert shards(tmp_path / "mixed") != shards(tmp_path / "plain")


def test_what_was_written_is_read_again_after_a_stop(
    tiny_model: Any, short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, wanted = tiny_model("llama"), recipe(short, GPTQ)
    wanted["calibration"] |= {"written": 0.5}
    compress(model, wanted, tmp_path / "whole", evaluated=False)
    stopped_before_the_walk(model, wanted, tmp_path / "out")
    monkeypatch.setattr(job, "write_windows", lambda *_, **__: pytest.fail("written twice"))
    compress(model, wanted, tmp_path / "out", evaluated=False)
    assert shards(tmp_path / "out") == shards(tmp_path / "whole")


def test_steps_that_read_no_text_have_none_written(
    tiny_model: Any, short: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job, "write_windows", lambda *_, **__: pytest.fail("nothing reads it"))
    short["calibration"] |= {"written": 1}
    compress(tiny_model("llama"), recipe(short, {"method": "rtn", "group_size": 32}), tmp_path / "out", evaluated=False)


def test_bits_are_allocated_on_written_text_too(tiny_model: Any, short: dict[str, Any], tmp_path: Path) -> None:
    short["calibration"] |= {"written": 1.0}
    del short["calibration"]["data"]
    found = api.allocate(tiny_model("llama"), recipe(short, {"method": "rtn", "group_size": 32}), bits=4, by="output")
    assert found.recipe.calibration.written == 1 and found.bits <= 4


def test_plans_count_the_writing(tiny_model: Any, short: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = open_checkpoint(tiny_model("llama"))
    layout = layout_of(checkpoint.config, checkpoint.specs())
    plain = load_recipe(recipe(short, GPTQ))
    written = plain.model_copy(update={"calibration": plain.calibration.model_copy(update={"written": 0.5})})
    modules = [(module, (0,)) for module in layout.modules if module.kind == "linear"]
    monkeypatch.setattr(costs, "WRITTEN_TOGETHER", 10_000)
    assert costs.operations(written, modules) > costs.operations(plain, modules)
    assert sum(costs.peak_memory(written, layout).values()) > sum(costs.peak_memory(plain, layout).values())


@pytest.mark.parametrize("share", [-0.1, 1.5, "half"])
def test_a_share_is_between_0_and_1(share: Any, short: dict[str, Any]) -> None:
    short["calibration"] |= {"written": share}
    with pytest.raises(RecipeError, match="calibration"):
        load_recipe(recipe(short, GPTQ))
