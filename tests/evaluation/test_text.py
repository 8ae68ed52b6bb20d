"""Reading text: every kind of source, and the error each bad one gives."""

from __future__ import annotations

import gzip
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from penjing.errors import CalibrationError, MissingDependency
from penjing.evaluation.text import load_documents

MESSAGES = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes."}]


def _write(path: Path, content: str | list) -> Path:
    text = content if isinstance(content, str) else "\n".join(json.dumps(record) for record in content)
    raw = text.encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.md", "a.raw", "a.txt.gz"])
def test_text_file_is_one_document(tmp_path, name):
    found = load_documents(_write(tmp_path / name, "Zażółć 盆景 🌱\r\n\r\nTwo."), "calibration")
    assert found.texts == ("Zażółć 盆景 🌱\n\nTwo.",)
    assert found.label == name and not found.truncated


def test_wikitext_rows_are_joined_as_the_papers_do(tmp_path):
    lines = [" ", " = Title = ", " ", " One @-@ two \u2028 still one line . ", " Three . "]
    path = _write(tmp_path / "wiki.test.raw", "".join(f"{line}\n" for line in lines))
    expected = "\n\n".join(["", " = Title = \n", "", " One @-@ two \u2028 still one line . \n", " Three . \n"])
    assert load_documents(path, "evaluation").joined() == expected


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"text": "one", "content": "two"}, "one"),
        ({"id": 1, "content": "two"}, "two"),
        ({"prompt": "2+2=", "completion": "4"}, "2+2=4"),
        ("just a string", "just a string"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz"])
def test_records(tmp_path, name, record, expected):
    content = [record, record] if "jsonl" in name else json.dumps([record, record])
    assert load_documents(_write(tmp_path / name, content), "calibration").texts == (expected, expected)


def test_json_with_data_key_and_blank_lines_in_jsonl(tmp_path):
    assert load_documents(_write(tmp_path / "a.json", '{"data": [{"text": "x"}]}'), "calibration").texts == ("x",)
    assert load_documents(_write(tmp_path / "a.jsonl", '{"text": "x"}\n\n{"text": "y"}\n'), "calibration").texts == (
        "x",
        "y",
    )


def test_messages_need_the_chat_template(tmp_path):
    path = _write(tmp_path / "chat.jsonl", [{"messages": MESSAGES}])
    with pytest.raises(CalibrationError, match="set `chat_template: true`"):
        load_documents(path, "calibration").joined()
    assert load_documents(path, "calibration", chat_template=True).chats == (tuple(MESSAGES),)
    pairs = _write(tmp_path / "pairs.jsonl", [{"prompt": "Hello?", "completion": "Yes."}])
    assert load_documents(pairs, "calibration", chat_template=True).chats == (tuple(MESSAGES),)


def test_directory_is_read_in_order_of_names(tmp_path):
    _write(tmp_path / "b.txt", "second")
    _write(tmp_path / "a.jsonl.gz", [{"text": "first"}])
    (tmp_path / "deep").mkdir()
    _write(tmp_path / "deep" / "c.md", "third")
    _write(tmp_path / "ignored.py", "print()")
    assert load_documents(tmp_path, "calibration").joined() == "first\n\nsecond\n\nthird"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"text": oops}', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", '{"text": "x"}\n\n{"body": "x", "id": 1}', "line 3: needs .* found keys: body, id"),
        ("a.jsonl", '{"text": 5}', "line 1: `text` must be a string, found int"),
        ("a.jsonl", '["x"]', "line 1: expected a record .* found a list"),
        ("a.json", '{"rows": []}', "expected a list of records .* found a mapping"),
        ("a.json", "{", "line 1: not valid JSON"),
        ("a.txt", " \n ", "no text found"),
        ("a.jsonl", "", "no text found"),
        ("a.csv", "x", "unknown kind of file"),
    ],
)
def test_bad_content_is_named(tmp_path, name, content, message):
    with pytest.raises(CalibrationError, match=message):
        load_documents(_write(tmp_path / name, content), "calibration")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"text": "x"}, "line 1: `chat_template` needs `messages`"),
        ({"messages": []}, "must be a list that is not empty"),
        ({"messages": [{"role": "user"}]}, "every message needs `role` and `content`"),
    ],
)
def test_bad_conversations_are_named(tmp_path, record, message):
    with pytest.raises(CalibrationError, match=message):
        load_documents(_write(tmp_path / "a.jsonl", [record]), "calibration", chat_template=True)


def test_bad_bytes_are_named(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"abc\xff")
    with pytest.raises(CalibrationError, match="not UTF-8 at byte 3"):
        load_documents(path, "calibration")
    broken = tmp_path / "b.txt.gz"
    broken.write_bytes(gzip.compress(b"some text " * 100)[:-20])
    with pytest.raises(CalibrationError, match=r"b\.txt\.gz: cannot be read"):
        load_documents(broken, "calibration")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CalibrationError, match="in this directory"):
        load_documents(empty, "calibration")


@pytest.mark.parametrize(
    "name", ["missing.txt", "./corpus", "/nowhere/corpus", "a/b/c", "corpus", "some/file.jsonl.gz"]
)
def test_a_path_that_does_not_exist_never_reaches_the_hub(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match="no such file or directory"):
        load_documents(name, "calibration")


def test_reading_stops_at_the_limit_and_says_so(tmp_path):
    path = _write(tmp_path / "a.jsonl", [{"text": "x" * 10}] * 5)
    found = load_documents(path, "calibration", max_characters=20)
    assert len(found.texts) == 2 and found.truncated and found.label == "first 2 documents of a.jsonl"
    assert not load_documents(path, "calibration", max_characters=50).truncated


def test_hub_needs_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(MissingDependency, match="pip install datasets"):
        load_documents("org/name", "calibration")


def test_hub_specification(monkeypatch):
    asked = []

    def load_dataset(name, config, *, split, streaming):
        asked.append((name, config, split, streaming))
        return iter([{"text": "a", "body": "b"}, {"text": "", "body": "c"}])

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert load_documents("org/name", "calibration").texts == ("a", "")
    assert load_documents("org/name:raw", "evaluation").texts == ("a", "")
    assert load_documents("org/name::valid:body", "evaluation").texts == ("b", "c")
    assert asked == [
        ("org/name", None, "train", True),
        ("org/name", "raw", "test", True),
        ("org/name", None, "valid", True),
    ]
    with pytest.raises(CalibrationError, match="row 1: no field 'nope'; found keys: text, body"):
        load_documents("org/name:::nope", "calibration")


def test_hub_without_network(monkeypatch):
    def load_dataset(*_, **__):
        raise ConnectionError("no route")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(CalibrationError, match=r"'org/name'.*ConnectionError: no route.*builtin"):
        load_documents("org/name", "calibration")
