"""A teacher whose answers were written down before: nothing is asked, nothing is paid, tests need no network."""

from __future__ import annotations

from pathlib import Path

from penjing.errors import TeacherError
from penjing.teachers.base import Reply, Request
from penjing.teachers.collection import read_collection


class RecordedTeacher:
    """The answers that `collect` kept in a file, given again under the name of the teacher who gave them."""

    def __init__(self, file: Path, name: str) -> None:
        self.name = name
        self._file, self._replies = file, read_collection(file)

    def __call__(self, request: Request) -> Reply:
        """Raises TeacherError for a request that was never asked."""
        reply = self._replies.get(request.key(self.name))
        if reply is None:
            raise TeacherError(
                f"{self._file} holds no answer of {self.name!r} to {request.prompt[:60]!r} with these settings"
            )
        return reply
