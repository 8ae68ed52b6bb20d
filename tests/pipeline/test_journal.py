"""A run resumes only what it really wrote, and only if nothing that decides the result has changed."""

import json
from dataclasses import replace

import pytest

from penjing.errors import OutputError, ResumeError
from penjing.pipeline.journal import FOLDER, Fingerprint, Journal

FINGERPRINT = Fingerprint(model="m", recipe="r", data="d", software="s", arithmetic="a")


def start(directory):
    journal = Journal.open(directory, FINGERPRINT)
    journal.save()
    (directory / "one").write_bytes(b"first shard")
    journal.add("one", {"rows": [1]})
    return journal


def test_a_finished_shard_is_remembered(tmp_path):
    start(tmp_path / "out")
    again = Journal.open(tmp_path / "out", FINGERPRINT)
    assert again.finished("one") == {"rows": [1]}
    assert again.finished("two") is None


@pytest.mark.parametrize("part", ["model", "recipe", "data", "software", "arithmetic"])
def test_a_change_is_refused_by_name(tmp_path, part):
    start(tmp_path / "out")
    with pytest.raises(ResumeError, match=rf"another {part}: {part} was \w+, is changed"):
        Journal.open(tmp_path / "out", replace(FINGERPRINT, **{part: "changed"}))


def test_a_shard_that_is_not_what_was_written_is_refused(tmp_path):
    start(tmp_path / "out")
    (tmp_path / "out" / "one").write_bytes(b"first shar_")
    with pytest.raises(ResumeError, match="one is not what this run wrote"):
        Journal.open(tmp_path / "out", FINGERPRINT).finished("one")


def test_a_directory_with_other_contents_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(OutputError, match="not an unfinished run"):
        Journal.open(tmp_path, FINGERPRINT)


def test_a_file_in_the_way_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="not an unfinished run"):
        Journal.open(tmp_path / "file", FINGERPRINT)


def test_a_finished_run_is_not_overwritten(tmp_path):
    start(tmp_path / "out").close()
    with pytest.raises(OutputError, match="choose another output"):
        Journal.open(tmp_path / "out", FINGERPRINT)


def test_a_damaged_journal_says_so(tmp_path):
    start(tmp_path / "out")
    (tmp_path / "out" / FOLDER / "journal.json").write_text("{")
    with pytest.raises(ResumeError, match="damaged"):
        Journal.open(tmp_path / "out", FINGERPRINT)


def test_leftovers_of_a_killed_write_are_removed(tmp_path):
    start(tmp_path / "out")
    leftover = tmp_path / "out" / ".model-00002.safetensors.123.tmp"
    leftover.write_bytes(b"half")
    Journal.open(tmp_path / "out", FINGERPRINT)
    assert not leftover.exists()


def test_the_journal_is_plain_json(tmp_path):
    start(tmp_path / "out")
    stored = json.loads((tmp_path / "out" / FOLDER / "journal.json").read_text())
    assert stored["fingerprint"]["model"] == "m"
