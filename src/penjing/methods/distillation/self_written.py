"""Training text written by the model itself, when there is none: the data of LLM-QAT.

A first token at random, `GREEDY` (three to five) more that are each the likeliest, so that something sensible begins,
and the rest drawn from the model's distribution, so that texts differ. Greedy throughout repeats itself; drawn
throughout begins with nonsense.

Source: Liu et al. 2023, "LLM-QAT" (arXiv:2305.17888), section 2.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from penjing.methods.training import IGNORED, Batch, Loss
from penjing.models.reading import draw, end_tokens, write

GREEDY = (3, 4, 5)
"""How many tokens after the first may be the likeliest ones; drawn per window."""

TOGETHER = 16
"""Windows of a pool that are written at once: one reading of the weights serves a token of each."""


def self_written(model: Any, windows: int, length: int, seed: int) -> tuple[Tensor, Tensor]:
    """Tokens (windows, length) and labels with `IGNORED` after the end of a text that came early."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.vocab_size
    starts = torch.randint(vocabulary, (windows, 1), generator=generator)
    greedy = torch.tensor(GREEDY)[torch.randint(len(GREEDY), (windows,), generator=generator)]
    device = next(model.parameters()).device

    def choose(number: int, logits: Sequence[Tensor]) -> Tensor:
        likeliest, drawn = logits[0].argmax(-1), draw(logits[0])
        return torch.where(number < greedy.to(device), likeliest, drawn)

    state = torch.get_rng_state()
    torch.manual_seed(seed)
    starts = starts.to(device)
    written = write([model], starts, torch.ones_like(starts), length - 1, choose, end_tokens(model))
    torch.set_rng_state(state)
    missing = length - 1 - written.tokens.shape[1]
    tokens = torch.cat([starts, written.tokens, written.tokens[:, -1:].expand(-1, missing)], 1)
    over = torch.nn.functional.pad(~written.mask, (1, 0), value=False)
    over = torch.nn.functional.pad(over, (0, missing), value=True)
    return tokens, tokens.masked_fill(over, IGNORED)


class SelfWritten(nn.Module):
    """An objective on windows of a pool that `writer` fills, instead of on those given.

    A window is written when it is first drawn, together with its neighbours.

    Which are drawn, and what is written, depend on the seeds alone: an interrupted run goes on with the same.
    """

    def __init__(self, objective: nn.Module, writer: nn.Module, pool: int, seed: int) -> None:
        super().__init__()
        self.objective = objective
        self._writer = [writer]  # in a list: the objective holds it as a module already
        self._pool, self._seed = pool, seed
        self._known: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def forward(self, model: nn.Module, batch: Batch) -> Loss:
        """The loss on as many windows, as long as those of `batch`."""
        given = batch["input_ids"]
        windows = [self._window(number, given.shape[1]) for number in self._chosen(len(given))]
        tokens, labels = (torch.stack(parts).to(given.device) for parts in zip(*windows, strict=True))
        return self.objective(model, {"input_ids": tokens, "labels": labels})

    def _chosen(self, count: int) -> list[int]:
        return torch.randint(self._pool, (count,)).tolist()

    def _window(self, number: int, length: int) -> tuple[Tensor, Tensor]:
        if (number, length) not in self._known:
            first = number - number % TOGETHER
            count = min(TOGETHER, self._pool - first)
            tokens, labels = self_written(self._writer[0], count, length, self._seed * 1_000_003 + first)
            for at, pair in enumerate(zip(tokens.cpu(), labels.cpu(), strict=True), first):
                self._known[at, length] = pair
        return self._known[number, length]
