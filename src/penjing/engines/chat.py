"""Talking to a model in an engine: the chat template, the answer as it comes, what was said before."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from penjing.checkpoint import open_checkpoint
from penjing.engines.base import LoadRequest, Sampling
from penjing.engines.onnxruntime import onnx_file
from penjing.engines.process import EngineProcess, default_threads
from penjing.engines.table import engine_for, model_path
from penjing.errors import CalibrationError
from penjing.evaluation.windows import load_tokenizer

_HALF_A_CHARACTER = "\ufffd"


@dataclass(frozen=True)
class Answer:
    """What a model said, and how fast: tokens per second of the answer, reading the prompt included."""

    model: str
    engine: str
    text: str
    tokens: int
    tokens_per_second: float

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


class Talk:
    """A conversation with one model; a context manager, because an engine runs beside.

        with Talk("demo") as talk:
            for piece in talk.say("Why is the sky blue?"):
                print(piece, end="")
            print(talk.last.tokens_per_second)

    A tokenizer without a chat template belongs to a model that only goes on with a text: each prompt stands alone then.
    Raises CalibrationError when the model has no tokenizer.
    """

    last: Answer

    def __init__(
        self,
        model: str | Path,
        engine: str | None = None,
        *,
        dtype: str = "auto",
        threads: int | None = None,
        context: int = 2048,
        trust_remote_code: bool = False,
    ) -> None:
        path = model_path(model, trust_remote_code=trust_remote_code)
        self.engine = engine_for(path, engine).name
        self.model, self._context = str(model), context
        self._tokenizer = load_tokenizer(_tokenizer_source(path, trust_remote_code))
        self._messages: list[dict[str, str]] = []
        request = LoadRequest(path, dtype, threads or default_threads(), context, 1, trust_remote_code)
        self._process = EngineProcess(self.engine, request)

    def say(self, text: str, sampling: Sampling | None = None) -> Iterator[str]:
        """The answer to `text`, piece by piece; `last` holds it when the last piece was taken."""
        sampling = sampling or Sampling()
        self._messages.append({"role": "user", "content": text})
        prompt = self._prompt(text)
        room = self._context - len(prompt)
        if room < 1:
            raise CalibrationError(f"the conversation has {len(prompt)} tokens and the context {self._context}")
        stop = (*sampling.stop, *self._end_tokens())
        limited = Sampling(min(sampling.tokens, room), sampling.temperature, sampling.top_p, sampling.seed, stop)
        tokens: list[int] = []
        shown, started = "", time.perf_counter()
        for token in self._process.generate(prompt, limited):
            tokens.append(token)
            whole = self._tokenizer.decode(tokens, skip_special_tokens=True)
            if whole != shown and not whole.endswith(_HALF_A_CHARACTER):
                yield whole[len(shown) :]
                shown = whole
        rest = self._tokenizer.decode(tokens, skip_special_tokens=True)[len(shown) :]
        if rest:
            yield rest
        seconds = time.perf_counter() - started
        self.last = Answer(self.model, self.engine, shown + rest, len(tokens), len(tokens) / seconds)
        self._messages.append({"role": "assistant", "content": shown + rest})

    def _prompt(self, text: str) -> list[int]:
        if not getattr(self._tokenizer, "chat_template", None):
            return list(self._tokenizer(text)["input_ids"])
        rendered = self._tokenizer.apply_chat_template(self._messages, tokenize=False, add_generation_prompt=True)
        return list(self._tokenizer(rendered, add_special_tokens=False)["input_ids"])

    def _end_tokens(self) -> list[int]:
        end = self._tokenizer.eos_token_id
        return [] if end is None else [int(end)]

    def close(self) -> None:
        """End the engine."""
        self._process.close()

    def __enter__(self) -> Talk:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _tokenizer_source(path: Path, trust_remote_code: bool) -> Any:
    file = onnx_file(path)
    if file is not None:
        return file.parent if (file.parent / "tokenizer_config.json").is_file() else file.parent.parent
    return open_checkpoint(path, trust_remote_code=trust_remote_code).files()
