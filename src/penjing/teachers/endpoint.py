"""A teacher behind an HTTP endpoint that speaks OpenAI's chat completions, as most servers of models do."""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from typing import Any

from penjing.errors import TeacherError
from penjing.teachers.base import Reply, Request

_AGAIN = (408, 409, 429, 500, 502, 503, 504)


class Endpoint:
    """Asks `url`/chat/completions.

    url      e.g. "http://localhost:8000/v1"
    model    the name by which the server knows it; also that of the teacher
    key      sent as a bearer token; empty for none
    tries    how often a request is made when the server is busy or fails, `pause` seconds apart, doubling
    timeout  seconds until an answer must have come
    """

    def __init__(
        self, url: str, model: str, key: str = "", *, tries: int = 5, pause: float = 1.0, timeout: float = 600.0
    ) -> None:
        self.name = model
        self._url = f"{url.rstrip('/')}/chat/completions"
        self._headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        self._tries, self._pause, self._timeout = tries, pause, timeout

    def __call__(self, request: Request) -> Reply:
        """Raises TeacherError naming the endpoint when it refuses, stays busy, or answers something else."""
        answer = self._post(
            {
                "model": self.name,
                "messages": request.messages,
                "temperature": request.temperature,
                "max_tokens": request.max_tokens,
            }
        )
        try:
            choice = answer["choices"][0]
            return Reply(choice["message"]["content"] or "", choice.get("finish_reason") != "length")
        except (KeyError, IndexError, TypeError) as error:
            raise TeacherError(f"{self._url}: no chat completion came back but {str(answer)[:200]}") from error

    def _post(self, body: dict[str, Any]) -> Any:
        asked = urllib.request.Request(self._url, json.dumps(body).encode(), self._headers)
        for attempt in range(1, self._tries + 1):
            try:
                with urllib.request.urlopen(asked, timeout=self._timeout) as answer:
                    return json.loads(answer.read())
            except urllib.error.HTTPError as error:
                told, again = f"HTTP {error.code}: {error.read()[:200].decode(errors='replace')}", error.code in _AGAIN
            except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
                told, again = str(error), True
            except ValueError as error:
                raise TeacherError(f"{self._url}: the answer is not JSON ({error})") from error
            if not again or attempt == self._tries:
                raise TeacherError(f"{self._url}: {told} (asked {attempt} times)")
            time.sleep(self._pause * 2 ** (attempt - 1))
        raise AssertionError("the last try returns or raises")
