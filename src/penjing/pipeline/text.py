"""From a recipe's words about text to token windows of the model at hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from penjing.checkpoint.base import Checkpoint
from penjing.errors import CalibrationError
from penjing.evaluation.text import Documents, load_documents
from penjing.evaluation.windows import (
    Protocol,
    describe,
    evaluation_windows,
    leading_token,
    load_tokenizer,
    render_chats,
    token_digest,
    token_windows,
)
from penjing.recipe import Calibration

_OWN = "text that the model wrote"


@dataclass(frozen=True)
class Text:
    """Token windows (S, T), how they were made, and the start of one as a person reads it."""

    tokens: Tensor
    protocol: Protocol
    sample: str


def positions(config: Mapping[str, Any]) -> int | None:
    """The longest window a model takes; None when its config sets no limit."""
    return config.get("max_position_embeddings") or config.get("n_positions")


class TextSource:
    """Cuts text with a model's own tokenizer, which is loaded once and only when needed."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._tokenizer: Any = None

    def calibration(self, wanted: Calibration) -> Text:
        """The windows whose activations the methods will see, but for those that the model is to write."""
        tokenizer = self._load(wanted.length)
        given = wanted.samples - wanted.own_windows
        if not given:
            nothing = torch.empty(0, wanted.length, dtype=torch.long)
            return Text(nothing, describe(Documents(_OWN), nothing, bos=self.bos), "")
        documents = load_documents(wanted.data, "calibration", chat_template=wanted.chat_template)
        if wanted.chat_template:
            documents = render_chats(documents, tokenizer)
        tokens = token_windows(
            documents, tokenizer, samples=given, length=wanted.length, seed=wanted.seed, bos=self.bos
        )
        return self._text(documents, tokens)

    def joined(self, given: Text, written: Tensor) -> Text:
        """Both sorts of windows, spread evenly among one another so that every part of them is a mixture."""
        count = len(given.tokens)
        place = torch.cat([torch.arange(count) / max(count, 1), (torch.arange(len(written)) + 0.5) / len(written)])
        tokens = torch.cat([given.tokens, written])[place.argsort(stable=True)]
        protocol = replace(
            given.protocol,
            corpus=f"{given.protocol.corpus} and {len(written)} windows of {_OWN}" if count else _OWN,
            token_hash=token_digest(tokens),
            windows=len(tokens),
            scored=len(tokens) * (tokens.shape[1] - 1),
        )
        return Text(tokens, protocol, given.sample or self.tokenizer.decode(written[0, :200]))

    def evaluation(self, data: str, windows: int | None, length: int) -> Text:
        """The windows that a model is measured on: the first of the text, without overlap."""
        tokenizer = self._load(length)
        documents = load_documents(data, "evaluation")
        tokens = evaluation_windows(documents, tokenizer, windows=windows, length=length, bos=self.bos)
        return self._text(documents, tokens)

    def _text(self, documents: Documents, tokens: Tensor) -> Text:
        vocabulary = self.checkpoint.config.get("vocab_size")
        if vocabulary and int(tokens.max()) >= vocabulary:
            raise CalibrationError(
                f"the tokenizer of {self.checkpoint.label} gives token {int(tokens.max())}, beyond the {vocabulary} "
                "rows of the embedding; it belongs to another model"
            )
        sample = self._tokenizer.decode(tokens[0, :200])
        return Text(tokens, describe(documents, tokens, bos=self.bos, dtype="float32"), sample)

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, as transformers loads it. Raises CalibrationError when there is none."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.checkpoint.files())
        return self._tokenizer

    @property
    def bos(self) -> int | None:
        """The token that this tokenizer puts before every text by itself."""
        return leading_token(self.tokenizer)

    def _load(self, length: int) -> Any:
        limit = positions(self.checkpoint.config)
        if limit and length > limit:
            raise CalibrationError(
                f"windows of {length} tokens are longer than the {limit} positions of {self.checkpoint.label}; "
                f"set `length: {limit}` or less"
            )
        return self.tokenizer
