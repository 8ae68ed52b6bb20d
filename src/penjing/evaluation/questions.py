"""Questions that a model answers without having been trained on them: what a file of them holds, what a score is.

A file is JSON lines (`.jsonl`, `.jsonl.gz`), all records of one of two shapes:

    {"query": "The capital of France is", "choices": ["Rome", "Paris"], "gold": 1}      multiple choice
    {"context": "Two roads diverged in a yellow", "continuation": "wood"}               continuation

What follows the query or the context stands after one space, unless there is white space already. A query whose last
line begins with "Question:" gets the line "Answer:" after it, as in the tasks of lm-eval: without it a model goes on
with the question.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penjing.errors import CalibrationError
from penjing.evaluation.text import records

SUFFIXES = (".jsonl", ".jsonl.gz")
SHAPES = "`query`, `choices` and `gold`, or `context` and `continuation`"
_FIELDS = {True: ("query", "choices", "gold"), False: ("context", "continuation")}


@dataclass(frozen=True)
class TaskScore:
    """What a model reached on one task by one measure.

    name       of the task: lm-eval's, or the file's without its ending
    metric     acc: share of the questions whose likeliest choice is the right one, or whose continuation is the one
               that the model itself would write; acc_norm: choices ranked by log-likelihood per character;
               perplexity: exp of the mean negative log-likelihood of a whole continuation; others: lm-eval's
    stderr     standard error of the value, None where lm-eval knows none
    questions  how many were asked
    shots      examples in the prompt
    chance     what guessing reaches on average, of accuracies with a known number of choices
    protocol   what must stand beside the number, in words
    """

    name: str
    metric: str
    value: float
    stderr: float | None
    questions: int
    shots: int
    chance: float | None
    protocol: str


@dataclass(frozen=True)
class Questions:
    """The records of a file: all of multiple choice, or all continuations.

    name     the file's name without its ending    digest  SHA-256 of the file, hex
    records  with the keys of their shape and no others
    """

    name: str
    digest: str
    multiple_choice: bool
    records: tuple[Mapping[str, Any], ...]


def is_file_of_questions(task: str) -> bool:
    """Whether a task is named by a file, and not by a name that lm-eval knows."""
    return task.endswith(SUFFIXES)


def read_questions(path: Path) -> Questions:
    """The questions of a file. Raises CalibrationError naming file, line and the rule that the line breaks."""
    if not path.is_file():
        raise CalibrationError(f"task {str(path)!r}: no such file")
    found, multiple_choice = [], None
    for where, record in records(path):
        shape = _shape(where, record)
        if multiple_choice not in (None, shape):
            raise CalibrationError(f"{where}: another shape than the lines before; one file holds one shape: {SHAPES}")
        multiple_choice = shape
        _check_choices(where, record) if shape else _require_text(where, record, "context", "continuation")
        found.append({key: record[key] for key in _FIELDS[shape]})
    if multiple_choice is None:
        raise CalibrationError(f"{path}: no record; each line needs {SHAPES}")
    name = path.name.removesuffix(".gz").removesuffix(".jsonl")
    return Questions(name, hashlib.sha256(path.read_bytes()).hexdigest(), multiple_choice, tuple(found))


def prompt(record: Mapping[str, Any]) -> str:
    """What a model reads before its answer."""
    if "context" in record:
        return record["context"]
    query: str = record["query"]
    asks = query.rstrip().rpartition("\n")[2].startswith("Question:")
    return f"{query.rstrip()}\nAnswer:" if asks else query


def joint(before: str, after: str) -> str:
    """What stands between a prompt and its answer.

    >>> joint("The sky is", "blue"), joint("2 + 2 =\\n", "4")
    (' ', '')
    """
    return "" if before[-1:].isspace() or after[:1].isspace() else " "


def _shape(where: str, record: Any) -> bool:
    """Whether a record is of multiple choice."""
    for multiple_choice, fields in _FIELDS.items():
        if isinstance(record, Mapping) and set(fields) <= record.keys():
            return multiple_choice
    keys = ", ".join(record) if isinstance(record, Mapping) else f"none in a {type(record).__name__}"
    raise CalibrationError(f"{where}: needs {SHAPES}; found keys: {keys}")


def _check_choices(where: str, record: Mapping[str, Any]) -> None:
    _require_text(where, record, "query")
    choices, gold = record["choices"], record["gold"]
    if not isinstance(choices, list) or len(choices) < 2:
        raise CalibrationError(f"{where}: `choices` must be a list of two texts or more")
    for number, choice in enumerate(choices):
        _require_text(where, {f"choices[{number}]": choice}, f"choices[{number}]")
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(choices):
        raise CalibrationError(
            f"{where}: `gold` must be the number of the right choice, 0 to {len(choices) - 1}; found {gold!r}"
        )


def _require_text(where: str, record: Mapping[str, Any], *keys: str) -> None:
    for key in keys:
        if not isinstance(record[key], str) or not record[key].strip():
            raise CalibrationError(f"{where}: `{key}` must be a string that is not empty, found {record[key]!r}")
