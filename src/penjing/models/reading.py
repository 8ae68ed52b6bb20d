"""A live language model that reads on, token by token, and says what may come next: for writing text with it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from penjing.errors import CheckpointError


class Reader:
    """One model and what it has read so far; rows may begin with padding.

    attention  int64 (B, P), 0 on padding, of the first tokens that are read
    """

    def __init__(self, model: nn.Module, attention: Tensor) -> None:
        self._model, self._attention = model, attention
        self._past: Any = None

    @torch.no_grad()
    def __call__(self, tokens: Tensor) -> Tensor:
        """Logits (B, V) for the token after `tokens` (B, t), which follow what was read before."""
        if self._past is not None:
            self._attention = torch.cat([self._attention, torch.ones_like(tokens)], 1)
        positions = (self._attention.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        output = self._model(
            input_ids=tokens,
            attention_mask=self._attention,
            position_ids=positions,
            past_key_values=self._past,
            use_cache=True,
        )
        self._past = output.past_key_values
        return output.logits[:, -1].float()


class Written(NamedTuple):
    """What was written: tokens int64 (B, n), and bool (B, n) false after the end of a row."""

    tokens: Tensor
    mask: Tensor


Choose = Callable[[int, Sequence[Tensor]], Tensor]
"""(number of the token, logits (B, V) of each model) -> the tokens (B,) to write."""


@torch.no_grad()
def write(
    models: Sequence[nn.Module],
    prompts: Tensor,
    attention: Tensor,
    limit: int,
    choose: Choose,
    ends: Iterable[int] = (),
) -> Written:
    """Continue prompts (B, P), padded on the left, by up to `limit` tokens that `choose` takes from the models' logits.

    A row is over after a token of `ends`, which still belongs to it; what follows repeats it and is masked. Models are
    in evaluation mode meanwhile.
    """
    modes = [model.training for model in models]
    readers = [Reader(model.eval(), attention) for model in models]
    going = torch.ones(len(prompts), dtype=torch.bool, device=prompts.device)
    stops = torch.tensor(list(ends), dtype=prompts.dtype, device=prompts.device)
    tokens: list[Tensor] = []
    mask: list[Tensor] = []
    read = prompts
    for number in range(limit):
        chosen = choose(number, [reader(read) for reader in readers])
        if tokens:
            chosen = torch.where(going, chosen, tokens[-1])
        tokens.append(chosen)
        mask.append(going)
        going = going & ~torch.isin(chosen, stops)
        read = chosen[:, None]
        if not going.any():
            break
    for model, mode in zip(models, modes, strict=True):
        model.train(mode)
    return Written(torch.stack(tokens, 1), torch.stack(mask, 1))


def end_tokens(model: Any) -> list[int]:
    """Tokens after which the model stops, from its configuration."""
    ends = model.config.eos_token_id
    return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)


def drawn(probabilities: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """One index (B,) per row of `probabilities` (B, V), which need not sum to 1, each as often as it is probable.

    Where a number drawn at random falls among the running sums; `torch.multinomial` draws one for every index. Raises
    CheckpointError where nothing is probable, as when they come from logits that are NaN.
    """
    sums = probabilities.cumsum(-1, dtype=torch.float64)
    total = sums[:, -1:]
    if not (total > 0).all():
        raise CheckpointError(
            "the model's logits are NaN or infinite: its weights are damaged, or training went astray"
        )
    at = torch.rand(len(sums), 1, dtype=torch.float64, device=sums.device, generator=generator)
    return torch.searchsorted(sums, at * total, right=True).squeeze(1).clamp_(max=sums.shape[1] - 1)


def draw(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Tokens (B,) drawn from softmax(logits / temperature), logits (B, V), with torch's own random numbers."""
    return drawn((logits / temperature).softmax(-1))
