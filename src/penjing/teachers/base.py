"""What a teacher is asked and what it answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Request:
    """A prompt and how to answer it.

    system       instruction that comes before the prompt; empty for none
    temperature  0: the likeliest token each time
    sample       tells requests apart that want several answers to the same prompt
    """

    prompt: str
    system: str = ""
    temperature: float = 0.0
    max_tokens: int = 512
    sample: int = 0

    def key(self, teacher: str) -> str:
        """SHA-256 of the request and of the teacher's name: the same question to the same teacher has one key."""
        return hashlib.sha256(json.dumps([teacher, asdict(self)], sort_keys=True).encode()).hexdigest()

    @property
    def messages(self) -> list[dict[str, str]]:
        """The request as chat messages."""
        before = [{"role": "system", "content": self.system}] if self.system else []
        return [*before, {"role": "user", "content": self.prompt}]


@dataclass(frozen=True)
class Reply:
    """A teacher's answer; `finished` when it ended by itself and not at the limit of tokens."""

    text: str
    finished: bool = True


Teacher = Callable[[Request], Reply]
"""Answers a request. It has a `name`, which is part of the key under which its answers are kept."""
