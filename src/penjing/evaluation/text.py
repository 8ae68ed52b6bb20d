"""Where text comes from: the built-in corpus, files, directories, hub data sets. No tokenizer, no torch here.

    builtin                      documentation that comes with Python and NumPy (see `builtin.py`)
    notes.txt  notes.md.gz       one document
    wiki.test.raw                WikiText: one document per line, as the rows of the data set (see `_wikitext_rows`)
    corpus.jsonl  corpus.json    records with `text`, `content`, `messages`, or `prompt` and `completion`
    folder/                      all such files in it, sorted by path
    org/name:config:split:field  a data set from the hub, the last three optional

Documents are always joined with a blank line ("\\n\\n") and tokenised once; see `windows.py`.
"""

from __future__ import annotations

import gzip
import itertools
import json
import re
import zlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from penjing.errors import CalibrationError, MissingDependency
from penjing.evaluation import builtin

Split = Literal["calibration", "evaluation"]
Chat = tuple[dict[str, Any], ...]

JOIN = "\n\n"
_TEXT_SUFFIXES = (".txt", ".md", ".raw")
_RECORD_SUFFIXES = (".jsonl", ".json")
_SUFFIXES = (*_TEXT_SUFFIXES, *_RECORD_SUFFIXES)
_WIKITEXT = re.compile(r"wiki\.\w+\.raw(\.gz)?")
_HUB = re.compile(r"[\w.-]+/[\w.-]+(:[^:]*){0,3}")
_HUB_SPLIT = {"calibration": "train", "evaluation": "test"}
_KEYS = "`text`, `content`, `messages`, or `prompt` and `completion`"
MAX_CHARACTERS = 64_000_000


@dataclass(frozen=True)
class Documents:
    """Text as read, before any tokenizer.

    label      how to call it in tables: "builtin (…)", a file name, a hub data set
    texts      the documents; empty when there are `chats`
    chats      conversations to be rendered with the tokenizer's chat template: tuples of {"role", "content"}
    truncated  reading stopped at the limit of characters, so this is only the beginning of the source
    """

    label: str
    texts: tuple[str, ...] = ()
    chats: tuple[Chat, ...] = ()
    truncated: bool = False

    def joined(self) -> str:
        """The one string that is tokenised. Conversations must have been rendered before (`windows.render_chats`)."""
        if self.chats:
            raise CalibrationError(f"{self.label}: records hold messages; set `chat_template: true` in the recipe")
        return JOIN.join(self.texts)


def load_documents(
    data: str | Path, split: Split, *, chat_template: bool = False, max_characters: int = MAX_CHARACTERS
) -> Documents:
    """Read `data` (forms in the module docstring).

    `split` picks the part of the built-in corpus, and of a hub data set that names no split (train or test); files
    are taken whole. With `chat_template`, records must hold `messages`, or `prompt` and `completion`. Reading stops
    after `max_characters`, and `truncated` says so. Raises CalibrationError naming file, line and what was found,
    MissingDependency when a hub data set needs the `datasets` package.
    """
    name = str(data)
    if name == "builtin":
        if chat_template:
            raise CalibrationError("the built-in text has no conversations; give a data file or drop `chat_template`")
        return _gather(builtin.label(), iter(builtin.documents(split)), max_characters)
    path = Path(data).expanduser()
    if path.is_dir():
        return _gather(f"{path.name}/", _read_directory(path, chat_template), max_characters)
    if path.is_file():
        return _gather(path.name, _read_file(path, chat_template), max_characters)
    if isinstance(data, Path) or _looks_like_a_path(name):
        raise CalibrationError(
            f"data {name!r}: no such file or directory. Give `builtin`, a {', '.join(_SUFFIXES)} file (.gz too), "
            "a directory of them, or a hub data set `org/name[:config][:split][:field]`"
        )
    return _gather(name, _read_hub(name, split, chat_template), max_characters)


def _gather(label: str, documents: Iterator[str | Chat], limit: int) -> Documents:
    texts: list[str] = []
    chats: list[Chat] = []
    size = 0
    for document in documents:
        if isinstance(document, str):
            texts.append(document)
            size += len(document)
        else:
            chats.append(document)
            size += sum(len(str(message.get("content", ""))) for message in document)
        if size >= limit:
            break
    truncated = next(documents, None) is not None
    if not chats and not any(text.strip() for text in texts):
        raise CalibrationError(f"{label}: no text found ({len(texts)} empty documents)")
    if truncated:
        label = f"first {len(texts) + len(chats):,} documents of {label}"
    return Documents(label, tuple(texts), tuple(chats), truncated)


def _looks_like_a_path(name: str) -> bool:
    if name.startswith((".", "/", "~")) or "\\" in name or name.removesuffix(".gz").endswith(_SUFFIXES):
        return True
    return not _HUB.fullmatch(name) or Path(name.split("/")[0]).is_dir()


def _read_directory(folder: Path, chat_template: bool) -> Iterator[str | Chat]:
    paths = sorted(path for path in folder.rglob("*") if path.name.removesuffix(".gz").endswith(_SUFFIXES))
    if not paths:
        raise CalibrationError(f"{folder}: no {', '.join(_SUFFIXES)} file (or .gz of one) in this directory")
    return itertools.chain.from_iterable(_read_file(path, chat_template) for path in paths)


def _read_file(path: Path, chat_template: bool) -> Iterator[str | Chat]:
    plain = path.name.removesuffix(".gz")
    if is_records(path):
        return _documents_of(records(path), chat_template)
    if not plain.endswith(_TEXT_SUFFIXES):
        raise CalibrationError(f"{path}: unknown kind of file; known: {', '.join(_SUFFIXES)} and .gz of them")
    if chat_template:
        raise CalibrationError(f"{path}: `chat_template` needs records with `messages`; a text file has none")
    text = _decode(path)
    return iter(_wikitext_rows(text) if _WIKITEXT.fullmatch(path.name) else [text])


def is_records(data: str | Path) -> bool:
    """Whether `data` names a file of records (JSONL or JSON, .gz too)."""
    return str(data).removesuffix(".gz").endswith(_RECORD_SUFFIXES)


def records(path: Path) -> Iterator[tuple[str, Any]]:
    """Where each record of a JSONL or JSON file stands, and the record. Raises CalibrationError naming the line."""
    text = _decode(path)
    lines = path.name.removesuffix(".gz").endswith(".jsonl")
    return _json_lines(path, text) if lines else _json_records(path, text)


def _decode(path: Path) -> str:
    """The text of a file with Unix line ends and no byte order mark."""
    try:
        raw = path.read_bytes()
        if path.suffix == ".gz":
            raw = gzip.decompress(raw)
        return raw.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: not UTF-8 at byte {error.start}; convert it first") from error
    except (OSError, EOFError, zlib.error) as error:
        raise CalibrationError(f"{path}: cannot be read: {error}") from error


def _wikitext_rows(text: str) -> list[str]:
    """Lines of `wiki.{train,valid,test}.raw` as the rows of the hub's wikitext-2-raw-v1.

    A blank line (" ") is an empty row and any other line keeps its newline, so joining the rows with a blank line
    gives the string whose perplexity GPTQ and the papers after it report.
    """
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    return [f"{line}\n" if line.strip() else "" for line in lines]


def _json_lines(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield where, json.loads(line)
            except json.JSONDecodeError as error:
                raise CalibrationError(f"{where}: not valid JSON: {error.msg} (column {error.colno})") from error


def _json_records(path: Path, text: str) -> Iterator[tuple[str, Any]]:
    try:
        content = json.loads(text)
    except json.JSONDecodeError as error:
        raise CalibrationError(f"{path}, line {error.lineno}: not valid JSON: {error.msg}") from error
    if isinstance(content, dict) and isinstance(content.get("data"), list):
        content = content["data"]
    if not isinstance(content, list):
        raise CalibrationError(f"{path}: expected a list of records (or `data`: a list), found {_kind(content)}")
    for number, record in enumerate(content, 1):
        yield f"{path}, record {number}", record


def _documents_of(records: Iterable[tuple[str, Any]], chat_template: bool) -> Iterator[str | Chat]:
    for where, record in records:
        if isinstance(record, str) and not chat_template:
            yield record
        elif isinstance(record, Mapping):
            yield _chat(where, record) if chat_template else _text(where, record)
        else:
            raise CalibrationError(f"{where}: expected a record with {_KEYS}, found {_kind(record)}")


def _text(where: str, record: Mapping[str, Any]) -> str | Chat:
    for key in ("text", "content"):
        if key in record:
            return _string(where, record, key)
    if "messages" in record:
        return _chat(where, record)
    if "prompt" in record and "completion" in record:
        return _string(where, record, "prompt") + _string(where, record, "completion")
    raise CalibrationError(f"{where}: needs {_KEYS}; found keys: {_found(record)}")


def _chat(where: str, record: Mapping[str, Any]) -> Chat:
    messages = record.get("messages")
    if messages is None and "prompt" in record and "completion" in record:
        return (
            {"role": "user", "content": _string(where, record, "prompt")},
            {"role": "assistant", "content": _string(where, record, "completion")},
        )
    if messages is None:
        raise CalibrationError(
            f"{where}: `chat_template` needs `messages`, or `prompt` and `completion`; found keys: {_found(record)}"
        )
    if not isinstance(messages, list) or not messages:
        raise CalibrationError(f"{where}: `messages` must be a list that is not empty, found {_kind(messages)}")
    for message in messages:
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise CalibrationError(f"{where}: every message needs `role` and `content`")
    return tuple(dict(message) for message in messages)


def _string(where: str, record: Mapping[str, Any], key: str) -> str:
    value = record[key]
    if not isinstance(value, str):
        raise CalibrationError(f"{where}: `{key}` must be a string, found {_kind(value)}")
    return value


def _found(record: Mapping[str, Any]) -> str:
    return ", ".join(map(str, record)) or "none"


def _kind(value: object) -> str:
    names = {dict: "a mapping", list: "a list", str: "a string", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _read_hub(name: str, split: Split, chat_template: bool) -> Iterator[str | Chat]:
    """Records of `org/name[:config][:split][:field]`, streamed so that a huge data set is not downloaded whole."""
    try:
        import datasets
    except ImportError as error:
        raise MissingDependency(
            f"data {name!r} is a hub data set, which needs the `datasets` package: pip install datasets"
        ) from error
    repository, config, part, field = [*name.split(":"), "", "", ""][:4]
    part = part or _HUB_SPLIT[split]
    try:
        rows = datasets.load_dataset(repository, config or None, split=part, streaming=True)
        yield from _documents_of(_hub_records(name, rows, field), chat_template)
    except CalibrationError:
        raise
    except Exception as error:  # every kind of network, hub and schema error of the library
        raise CalibrationError(
            f"data {name!r}: split {part!r} of the hub data set {repository!r} cannot be read "
            f"({type(error).__name__}: {error}). Without a network, give a file or `builtin`"
        ) from error


def _hub_records(name: str, rows: Iterable[Mapping[str, Any]], field: str) -> Iterator[tuple[str, Any]]:
    for number, row in enumerate(rows, 1):
        where = f"{name}, row {number}"
        if field and field not in row:
            raise CalibrationError(f"{where}: no field {field!r}; found keys: {_found(row)}")
        yield where, row[field] if field else row
