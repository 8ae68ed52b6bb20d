"""Batches: packed windows of tokens, and pairs of a prompt and the answer to be learnt.

A source of batches is a function of the number of the step, so that a run which continues sees what it would have
seen. Every window or pair comes once before any comes again, in an order that the seed decides.

A file of pairs holds records (JSONL or JSON) with `prompt` and `response` (or `completion`), or with `messages`, whose
answers by the assistant are learnt. Where the tokenizer has a chat template, both are rendered with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penjing.errors import CalibrationError
from penjing.evaluation.text import is_records, records
from penjing.evaluation.windows import leading_token
from penjing.methods.training import IGNORED, Batch

Batches = Callable[[int], Sequence[Batch]]
"""The micro-batches of a step, counted from 0."""


@dataclass(frozen=True)
class Order:
    """Which of `count` items make the micro-batches of a step."""

    count: int
    batch_size: int
    micro_batch: int
    seed: int

    def __call__(self, step: int) -> list[list[int]]:
        """Lists of numbers below `count`. A batch may span the end of one turn through the items and the next."""
        first = step * self.batch_size
        chosen = [self._turn(at // self.count)[at % self.count] for at in range(first, first + self.batch_size)]
        return [chosen[at : at + self.micro_batch] for at in range(0, len(chosen), self.micro_batch)]

    def _turn(self, number: int) -> list[int]:
        if self._known.get(number) is None:
            self._known.clear()
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
            self._known[number] = torch.randperm(self.count, generator=generator).tolist()
        return self._known[number]

    @cached_property
    def _known(self) -> dict[int, list[int]]:
        return {}


class Windows:
    """Batches of token windows (S, T), every token of which is learnt."""

    def __init__(self, tokens: Tensor, batch_size: int, micro_batch: int, seed: int) -> None:
        self.tokens = tokens
        self._order = Order(len(tokens), batch_size, micro_batch, seed)

    def __call__(self, step: int) -> list[Batch]:
        chosen = [self.tokens[rows] for rows in self._order(step)]
        return [{"input_ids": tokens, "labels": tokens} for tokens in chosen]


@dataclass(frozen=True)
class Pair:
    """A text of which only some tokens are learnt: int64 (T,) ids, and bool (T,) true for tokens of answers."""

    ids: Tensor
    learnt: Tensor

    @property
    def prompt(self) -> Tensor:
        """The ids before the first answer."""
        return self.ids[: int(self.learnt.int().argmax())]


class Pairs:
    """Batches of pairs, filled up on the right with `padding`."""

    def __init__(self, pairs: Sequence[Pair], padding: int, batch_size: int, micro_batch: int, seed: int) -> None:
        self.pairs = pairs
        self._padding = padding
        self._order = Order(len(pairs), batch_size, micro_batch, seed)

    def __call__(self, step: int) -> list[Batch]:
        return [collate([self.pairs[row] for row in rows], self._padding) for rows in self._order(step)]


def collate(pairs: Sequence[Pair], padding: int) -> Batch:
    """Pairs of any lengths as one batch."""
    longest = max(len(pair.ids) for pair in pairs)
    ids = torch.full((len(pairs), longest), padding)
    labels = torch.full_like(ids, IGNORED)
    mask = torch.zeros_like(ids)
    for row, pair in enumerate(pairs):
        ids[row, : len(pair.ids)] = pair.ids
        mask[row, : len(pair.ids)] = 1
        labels[row, : len(pair.ids)][pair.learnt] = pair.ids[pair.learnt]
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def holds_pairs(data: str | Path) -> bool:
    """Whether `data` is a file of records with prompts or messages, and not of plain text."""
    if not is_records(data) or not Path(data).is_file():
        return False
    first = next((record for _, record in records(Path(data))), None)
    return isinstance(first, Mapping) and not {"text", "content"} & first.keys()


def read_pairs(data: str | Path, tokenizer: Any, length: int, samples: int | None = None) -> list[Pair]:
    """Pairs from a file of records (form in the module docstring), the first `samples` of those that fit `length`.

    Raises CalibrationError naming file and record when one has no prompt or no answer, and when none fits.
    """
    pairs: list[Pair] = []
    longest = 0
    for where, record in records(Path(data)):
        pair = _pair(where, _parts(where, record), tokenizer)
        if not pair.learnt[1:].any():
            raise CalibrationError(f"{where}: there is no answer to learn")
        longest = max(longest, len(pair.ids))
        if len(pair.ids) <= length:
            pairs.append(pair)
        if len(pairs) == samples:
            break
    if not pairs:
        raise CalibrationError(f"{data}: no pair fits {length} tokens; the longest has {longest}: raise `length`")
    return pairs


def padding_of(tokenizer: Any) -> int:
    """The token that fills rows up; its value matters to nobody, as it is masked."""
    known = [token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None]
    return known[0] if known else 0


def _parts(where: str, record: object) -> list[dict[str, str]]:
    """Messages of a record, each with role and content."""
    if isinstance(record, Mapping):
        answer = record.get("response", record.get("completion"))
        if isinstance(record.get("prompt"), str) and isinstance(answer, str):
            prompt = record["prompt"]
            return [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        messages = record.get("messages")
        if isinstance(messages, list) and all(
            isinstance(message, Mapping) and {"role", "content"} <= message.keys() for message in messages
        ):
            return [dict(message) for message in messages]
    raise CalibrationError(f"{where}: needs `prompt` and `response`, or `messages` with `role` and `content`")


def _pair(where: str, messages: list[dict[str, str]], tokenizer: Any) -> Pair:
    """The ids of a conversation. Each answer is learnt with what the template puts after it (its end).

    Prompt and answer are tokenised apart, as the answer will be when the model gives it.
    """
    bos = None if tokenizer.chat_template else leading_token(tokenizer)
    ids = [] if bos is None else [bos]
    learnt = [False] * len(ids)
    done = ""
    for number, message in enumerate(messages, 1):
        text = _render(messages[:number], tokenizer, to_be_answered=_answered(messages, number))
        if not text.startswith(done):
            raise CalibrationError(
                f"{where}: the chat template rewrites earlier messages when message {number} is added, so what is "
                "learnt cannot be told from what is not; give records of one prompt and one response"
            )
        piece = tokenizer(text[len(done) :], add_special_tokens=False)["input_ids"]
        ids += piece
        learnt += [message["role"] == "assistant"] * len(piece)
        done = text
    return Pair(torch.tensor(ids, dtype=torch.long), torch.tensor(learnt, dtype=torch.bool))


def _answered(messages: Sequence[Mapping[str, str]], number: int) -> bool:
    return number < len(messages) and messages[number]["role"] == "assistant"


def _render(messages: list[dict[str, str]], tokenizer: Any, *, to_be_answered: bool) -> str:
    """Messages as one text, up to where the assistant begins its answer if it is the assistant's turn."""
    if tokenizer.chat_template:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=to_be_answered)
    end = tokenizer.eos_token or ""
    return "".join(message["content"] + (end if message["role"] == "assistant" else "") for message in messages)
