"""Teachers in memory, behind a server on loopback, and recorded; collections that stop and go on."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from penjing.errors import TeacherError
from penjing.teachers import Endpoint, LocalTeacher, RecordedTeacher, Reply, Request, collect


class Counting:
    """Answers in capitals and counts; dies at the request with the number `dies_at`."""

    name = "loud"

    def __init__(self, dies_at: int = -1) -> None:
        self.asked: list[str] = []
        self.dies_at = dies_at

    def __call__(self, request: Request) -> Reply:
        if len(self.asked) == self.dies_at:
            raise KeyboardInterrupt
        self.asked.append(request.prompt)
        return Reply(request.prompt.upper())


REQUESTS = [Request(word) for word in ("one", "two", "drei, über", "four")]


def test_no_answer_is_paid_for_twice(tmp_path: Path) -> None:
    file = tmp_path / "answers.jsonl"
    with pytest.raises(KeyboardInterrupt):
        collect(Counting(dies_at=2), REQUESTS, file)
    with file.open("ab") as lines:
        lines.write(b'{"key": "half a li')
    second = Counting()
    replies = collect(second, [*REQUESTS, REQUESTS[0]], file)
    assert second.asked == ["drei, über", "four"]
    assert [reply.text for reply in replies] == ["ONE", "TWO", "DREI, ÜBER", "FOUR", "ONE"]
    assert len(file.read_text(encoding="utf-8").splitlines()) == 4
    assert collect(RecordedTeacher(file, "loud"), REQUESTS, tmp_path / "again.jsonl") == replies[:4]
    with pytest.raises(TeacherError, match="holds no answer of 'loud' to 'five'"):
        RecordedTeacher(file, "loud")(Request("five"))
    file.write_text(file.read_text(encoding="utf-8") + "nonsense\n", encoding="utf-8")
    with pytest.raises(TeacherError, match=r"answers\.jsonl:5"):
        collect(Counting(), REQUESTS, file)


def test_another_setting_is_another_request() -> None:
    kinds = (Request("a"), Request("a", temperature=1.0), Request("a", sample=1), Request("a", system="b"))
    assert len({request.key(name) for request in kinds for name in ("t", "u")}) == 8


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict[str, Any]], list[Any]]]:
    """(url, requests seen, answers to give: a status code or a body)."""
    seen: list[dict[str, Any]] = []
    answers: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append({"path": self.path, "key": self.headers.get("Authorization"), **body})
            answer = answers.pop(0)
            self.send_response(answer if isinstance(answer, int) else 200)
            self.end_headers()
            self.wfile.write(b"no" if isinstance(answer, int) else json.dumps(answer).encode())

        def log_message(self, *args: Any) -> None:
            """Quiet."""

    listening = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}/v1/", seen, answers
    listening.shutdown()
    listening.server_close()


def completion(text: str, reason: str = "stop") -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": reason}]}


def test_an_endpoint_is_asked_again_when_it_is_busy(server) -> None:
    url, seen, answers = server
    answers += [503, 429, completion("yes"), completion("cut o", "length")]
    teacher = Endpoint(url, "large", "secret", pause=0.0)
    assert teacher(Request("is it?", system="Be brief.", temperature=0.5, max_tokens=7)) == Reply("yes")
    assert len(seen) == 3 and seen[2]["path"] == "/v1/chat/completions" and seen[2]["key"] == "Bearer secret"
    assert seen[2]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (seen[2]["model"], seen[2]["temperature"], seen[2]["max_tokens"]) == ("large", 0.5, 7)
    assert teacher(Request("more")) == Reply("cut o", finished=False)


def test_an_endpoint_that_fails_says_how(server) -> None:
    url, _, answers = server
    answers += [401, 503, 503, {"odd": 1}]
    teacher = Endpoint(url, "large", pause=0.0, tries=2)
    with pytest.raises(TeacherError, match=r"HTTP 401: no \(asked 1 times\)"):
        teacher(Request("x"))
    with pytest.raises(TeacherError, match=r"HTTP 503: no \(asked 2 times\)"):
        teacher(Request("x"))
    with pytest.raises(TeacherError, match="no chat completion"):
        teacher(Request("x"))
    with pytest.raises(TeacherError, match="asked 2 times"):
        Endpoint("http://127.0.0.1:9", "gone", tries=2, pause=0.0)(Request("x"))


def test_a_model_in_memory_answers_the_same_twice(tiny_model) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = tiny_model("llama")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(directory), AutoTokenizer.from_pretrained(directory)
    teacher = LocalTeacher(model, tokenizer, "tiny")
    asked = Request("The old pine", temperature=1.0, max_tokens=8)
    assert teacher(asked) == teacher(asked) != teacher(Request("The old pine", temperature=1.0, max_tokens=8, sample=1))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "The old pine"}], tokenize=False, add_generation_prompt=True
    )
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    wanted = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert teacher(Request("The old pine", max_tokens=8)).text == tokenizer.decode(wanted, skip_special_tokens=True)
