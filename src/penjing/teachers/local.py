"""A transformers model in memory as a teacher."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from penjing.models.reading import draw, end_tokens, write
from penjing.teachers.base import Reply, Request


class LocalTeacher:
    """Answers with a model and its tokenizer, through its chat template where it has one.

    The random numbers of an answer follow from the request, so the same request has the same answer.
    """

    def __init__(self, model: Any, tokenizer: Any, name: str) -> None:
        self.name = name
        self._model, self._tokenizer = model.eval(), tokenizer

    def __call__(self, request: Request) -> Reply:
        """The model's continuation of the prompt."""
        device = next(self._model.parameters()).device
        ids = torch.tensor([self._prompt(request)], device=device)
        state = torch.get_rng_state()
        torch.manual_seed(int(hashlib.sha256(request.key(self.name).encode()).hexdigest()[:15], 16))

        def choose(number: int, logits: Sequence[Tensor]) -> Tensor:
            return draw(logits[0], request.temperature) if request.temperature else logits[0].argmax(-1)

        ends = end_tokens(self._model)
        written = write([self._model], ids, torch.ones_like(ids), request.max_tokens, choose, ends)
        torch.set_rng_state(state)
        tokens = written.tokens[0].tolist()
        finished = tokens[-1] in ends
        return Reply(self._tokenizer.decode(tokens[:-1] if finished else tokens, skip_special_tokens=True), finished)

    def _prompt(self, request: Request) -> list[int]:
        if self._tokenizer.chat_template:
            text = self._tokenizer.apply_chat_template(request.messages, tokenize=False, add_generation_prompt=True)
            return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
        text = "\n\n".join(message["content"] for message in request.messages)
        return list(self._tokenizer(text)["input_ids"])
