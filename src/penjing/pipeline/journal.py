"""What makes a run resumable: a fingerprint of everything that decides the result, and the shards already written."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from penjing.checkpoint import write_bytes, write_shard
from penjing.errors import OutputError, ResumeError

FOLDER = ".penjing"
_FILE = "journal.json"


@dataclass(frozen=True)
class Fingerprint:
    """Digests of what the written bytes depend on, each with a name a person understands."""

    model: str
    recipe: str
    data: str
    software: str
    arithmetic: str

    def as_dict(self) -> dict[str, str]:
        return dict(self.__dict__)


def require_usable(directory: Path) -> None:
    """Raise OutputError unless the directory is missing, empty, or holds an unfinished run."""
    unfinished = (directory / FOLDER / _FILE).is_file()
    if not unfinished and directory.exists() and not _never_used(directory):
        raise OutputError(
            f"{directory} exists and is not an unfinished run of penjing; choose another output or empty it"
        )


@contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Keep every other run out of a directory, which is made if it is missing. Raises OutputError if one is at work.

    The lock is on the directory itself: it leaves no file behind and ends with the process, however that ends.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        handle = os.open(directory, os.O_RDONLY)
    except OSError as error:
        raise OutputError(f"cannot write into {directory}: {error.strerror}; choose another output") from error
    try:
        with suppress(OSError):  # some network file systems have no locks
            _lock(handle, directory)
        yield
    finally:
        os.close(handle)


def _lock(handle: int, directory: Path) -> None:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputError(
            f"another run of penjing is at work in {directory}; wait until it ends, or choose another output"
        ) from None


class Journal:
    """Finished shards of one output directory, on disk after every shard."""

    def __init__(
        self,
        directory: Path,
        fingerprint: Fingerprint,
        shards: dict[str, dict[str, Any]],
        tuned: Sequence[int] = (),
        pending: Sequence[str] = (),
    ) -> None:
        self.directory = directory
        self.fingerprint = fingerprint
        self.shards = shards
        self._tuned, self._pending = list(tuned), list(pending)

    @classmethod
    def open(cls, directory: Path, fingerprint: Fingerprint) -> Journal:
        """A new journal in an empty or missing directory, or the one of an interrupted run of the same job.

        Raises OutputError for a directory with other contents or a finished run, ResumeError when something that
        decides the result has changed.
        """
        require_usable(directory)
        path = directory / FOLDER / _FILE
        for leftover in (*directory.glob(".*.tmp"), *path.parent.glob(".*.tmp")):
            leftover.unlink()
        if not path.is_file():
            return cls(directory, fingerprint, {})
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
            before, shards = stored["fingerprint"], stored["shards"]
        except (ValueError, KeyError) as error:
            raise ResumeError(f"{path} is damaged ({error}); remove {directory} and start again") from error
        changed = [key for key, value in fingerprint.as_dict().items() if before.get(key) != value]
        if changed:
            raise ResumeError(
                f"{directory} holds an unfinished run with another {' and '.join(changed)}: "
                + "; ".join(f"{key} was {before.get(key)}, is {getattr(fingerprint, key)}" for key in changed)
                + ". Choose another output directory, or remove this one"
            )
        journal = cls(directory, fingerprint, shards, stored.get("tuned", ()), stored.get("pending", ()))
        journal._put_in_place()
        return journal

    def finished(self, shard: str) -> dict[str, Any] | None:
        """What was noted when the shard was written, if it is there and unharmed; None if it has to be made.

        Raises ResumeError when the file differs from what was written.
        """
        entry = self.shards.get(shard)
        if entry is None:
            return None
        path = self.directory / shard
        if not path.is_file() or digest(path) != entry["sha256"]:
            raise ResumeError(f"{path} is not what this run wrote; remove {self.directory} and start again")
        return entry["notes"]

    def add(self, shard: str, notes: dict[str, Any]) -> None:
        """Record a shard that is safely on disk."""
        self.shards[shard] = {"sha256": digest(self.directory / shard), "notes": notes}
        self.save()

    def is_tuned(self, step: int) -> bool:
        """Whether the recipe's step with this number has already changed the finished shards."""
        return step in self._tuned

    def replace(self, step: int, shards: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Put other tensors into finished shards, all or none, and note that the recipe's step did so."""
        for name, tensors in shards.items():
            path = self.directory / FOLDER / name
            write_shard(path, dict(tensors))
            self.shards[name]["sha256"] = digest(path)
        self._tuned.append(step)
        self._pending = sorted(shards)
        self.save()
        self._put_in_place()

    def _put_in_place(self) -> None:
        """Move the new shards that the journal already counts as written over the old ones."""
        for name in self._pending:
            new = self.directory / FOLDER / name
            if new.is_file():
                new.replace(self.directory / name)
        if self._pending:
            self._pending = []
            self.save()

    def save(self) -> None:
        """Write the journal (atomically)."""
        (self.directory / FOLDER).mkdir(parents=True, exist_ok=True)
        stored: dict[str, Any] = {"fingerprint": self.fingerprint.as_dict(), "shards": self.shards}
        stored |= {"tuned": self._tuned, "pending": self._pending}
        write_bytes(self.directory / FOLDER / _FILE, json.dumps(stored, indent=1).encode())

    def close(self) -> None:
        """The run is complete: nothing is left to resume."""
        (self.directory / FOLDER / _FILE).unlink(missing_ok=True)


def _never_used(directory: Path) -> bool:
    """Empty, or left by a run that was killed before its journal was first written."""
    if not directory.is_dir():
        return False
    entries = [*directory.iterdir(), *(directory / FOLDER).glob("*")]
    return all(entry == directory / FOLDER or entry.match(f"{FOLDER}/.{_FILE}.*.tmp") for entry in entries)


def digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
