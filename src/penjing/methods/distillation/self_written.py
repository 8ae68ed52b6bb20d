"""Training text written by the model itself, when there is none: the data of LLM-QAT.

A first token at random, `GREEDY` (three to five) more that are each the likeliest, so that something sensible begins,
and the rest drawn from the model's distribution, so that texts differ. Greedy throughout repeats itself; drawn
throughout begins with nonsense.

Source: Liu et al. 2023, "LLM-QAT" (arXiv:2305.17888), section 2.1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from penjing.methods.training import IGNORED, Batch, Loss
from penjing.models.reading import Written, draw, end_tokens, write

GREEDY = (3, 4, 5)
"""How many tokens after the first may be the likeliest ones; drawn per window."""

TOGETHER = 16
"""Windows of a pool that are written at once: one reading of the weights serves a token of each."""


def self_written(
    model: Any,
    windows: int,
    length: int,
    seed: int,
    *,
    bos: int | None = None,
    ends: Iterable[int] = (),
    told: Callable[[int], None] = lambda number: None,
) -> Written:
    """What `model` writes: `windows` texts, `length` tokens each.

    bos   token that comes first in each text and counts towards its length
    ends  tokens after which a text is over; without any, the model goes on with another one
    told  called before each token with its number
    """
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.vocab_size
    starts = torch.randint(vocabulary, (windows, 1), generator=generator)
    greedy = torch.tensor(GREEDY)[torch.randint(len(GREEDY), (windows,), generator=generator)]
    device = next(model.parameters()).device
    greedy = greedy.to(device)

    def choose(number: int, logits: Sequence[Tensor]) -> Tensor:
        told(number)
        chosen = draw(logits[0])
        return torch.where(number < greedy, logits[0].argmax(-1), chosen) if number < max(GREEDY) else chosen

    if bos is not None:
        starts = torch.cat([torch.full_like(starts, bos), starts], 1)
    prompts = starts.to(device)[:, : length - 1]
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    written = write([model], prompts, torch.ones_like(prompts), length - prompts.shape[1], choose, ends)
    torch.set_rng_state(state)
    missing = length - prompts.shape[1] - written.tokens.shape[1]
    tokens = torch.cat([prompts, written.tokens, written.tokens[:, -1:].expand(-1, missing)], 1)
    mask = torch.nn.functional.pad(written.mask, (prompts.shape[1], 0), value=True)
    return Written(tokens, torch.nn.functional.pad(mask, (0, missing), value=False))


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
            model, seed = self._writer[0], self._seed * 1_000_003 + first
            tokens, mask = self_written(model, count, length, seed, ends=end_tokens(model))
            labels = tokens.masked_fill(~mask, IGNORED)
            for at, pair in enumerate(zip(tokens.cpu(), labels.cpu(), strict=True), first):
                self._known[at, length] = pair
        return self._known[number, length]
