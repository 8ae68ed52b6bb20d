"""Asking a teacher many questions, with every answer on disk before the next question is asked.

The file is JSON lines, only ever appended to: one line per answer, under the key of its request. A line that a killed
run left half written is cut off. Answers to requests that are no longer wanted stay in the file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from penjing.errors import TeacherError
from penjing.teachers.base import Reply, Request


def collect(teacher: Any, requests: Iterable[Request], file: Path) -> list[Reply]:
    """The replies to `requests`, in order; only those that `file` does not hold are asked.

    Raises TeacherError naming the line when the file is not what this function writes, and what the teacher raises.
    """
    requests = list(requests)
    known = read_collection(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as lines:
        for request in requests:
            key = request.key(teacher.name)
            if key in known:
                continue
            reply = teacher(request)
            record = {"key": key, "teacher": teacher.name, "request": asdict(request), "reply": asdict(reply)}
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
            lines.flush()
            os.fsync(lines.fileno())
            known[key] = reply
    return [known[request.key(teacher.name)] for request in requests]


def read_collection(file: Path) -> dict[str, Reply]:
    """Key -> reply of a collection; empty when there is no file. A half-written last line is cut off the file."""
    if not file.is_file():
        return {}
    content = file.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with file.open("r+b") as lines:
            lines.truncate(len(whole))
    return {record["key"]: Reply(**record["reply"]) for record in _records(file, whole.decode("utf-8"))}


def _records(file: Path, text: str) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(text.splitlines(), 1):
        try:
            record = json.loads(line)
            Reply(**record["reply"])
            record["key"]
        except (ValueError, KeyError, TypeError) as error:
            raise TeacherError(f"{file}:{number} is no line of a collection ({error}); move the file away") from error
        yield record
