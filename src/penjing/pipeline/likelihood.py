"""How likely a streamed model finds given continuations of given contexts, block by block for all of them at once.

Requests with the same input (the choices of a question that are one token long) run once. Inputs are sorted by length
and padded on the right, which a causal model does not see, to one of few lengths, since how blocks are called has to be
learnt for each. A pass takes as many of them through all blocks as their hidden states may fill memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from penjing.evaluation.metrics import token_log_likelihoods
from penjing.pipeline.measure import CHUNK
from penjing.pipeline.stream import StreamedModel

PASS_BYTES = 256 * 2**20
"""Hidden states, in fp32, that go through the blocks together. Every pass reads the whole model once."""

Request = tuple[Sequence[int], Sequence[int]]
"""Token ids of a context, at least one, and of what follows it, at least one and no more than the model takes."""


@dataclass
class _Input:
    """Tokens that the model reads, and what is asked about the last of them: (request, ids of its continuation)."""

    tokens: tuple[int, ...]
    asked: list[tuple[int, Sequence[int]]] = field(default_factory=list)

    @property
    def scored(self) -> int:
        """The last so many tokens whose predictions are needed."""
        return max(len(targets) for _, targets in self.asked)


def log_likelihoods(
    stream: StreamedModel,
    requests: Sequence[Request],
    limit: int | None,
    progress: Callable[[int, int, str], None],
) -> list[tuple[float, bool]]:
    """For each request the log-likelihood of its continuation, in nats, and whether every token of it is the likeliest.

    What is longer than `limit` tokens loses its beginning. `progress(done, of, note)` counts blocks over all passes.
    Raises CalibrationError for logits that are not finite.
    """
    inputs = _inputs(requests, limit)
    answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
    width = stream.layout.embedding.shape[1]
    passes = list(_passes(inputs, limit, PASS_BYTES // (4 * width)))
    blocks = stream.layout.blocks
    for number, batches in enumerate(passes):
        note = f"pass {number + 1} of {len(passes)}" if len(passes) > 1 else ""
        states = [stream.embed(_padded(batch, length), torch.float32) for length, batch in batches]
        for index in range(blocks):
            with stream.block(index, torch.float32) as block:
                for each in states:
                    stream.advance(block, index, each)
            progress(number * blocks + index + 1, len(passes) * blocks, note)
        read = [given for _, batch in batches for given in batch]
        rows = [row for each in states for row in each]
        for request, answer in _answers(stream, read, rows, limit):
            answers[request] = answer
    return answers


def _inputs(requests: Sequence[Request], limit: int | None) -> list[_Input]:
    """What the model has to read, the shortest first."""
    inputs: dict[tuple[int, ...], _Input] = {}
    for number, (context, continuation) in enumerate(requests):
        tokens = (*context, *continuation)[:-1]
        tokens = tokens if limit is None else tokens[-limit:]
        inputs.setdefault(tokens, _Input(tokens)).asked.append((number, continuation))
    return sorted(inputs.values(), key=lambda given: len(given.tokens))


def padded_length(length: int, limit: int | None) -> int:
    """The next of few lengths: multiples of an eighth of the power of two below, at least of 8, and `limit` itself.

    >>> [padded_length(length, 1024) for length in (3, 17, 65, 100, 129, 1020)]
    [8, 24, 72, 104, 144, 1024]
    """
    step = max(8, 2 ** (length.bit_length() - 1) // 8)
    rounded = -(-length // step) * step
    return rounded if limit is None else min(rounded, limit)


def _passes(inputs: Sequence[_Input], limit: int | None, tokens: int) -> Iterator[list[tuple[int, list[_Input]]]]:
    """Inputs (length after padding, those of it) whose padded lengths add up to `tokens`, or a single longer one."""
    batches: dict[int, list[_Input]] = {}
    taken = 0
    for given in inputs:
        length = padded_length(len(given.tokens), limit)
        if batches and taken + length > tokens:
            yield list(batches.items())
            batches, taken = {}, 0
        batches.setdefault(length, []).append(given)
        taken += length
    if batches:
        yield list(batches.items())


def _padded(inputs: Sequence[_Input], length: int) -> Tensor:
    """Token ids int64 (S, length); token 0 pads on the right, where nothing is asked."""
    padded = torch.zeros(len(inputs), length, dtype=torch.int64)
    for row, given in zip(padded, inputs, strict=True):
        row[: len(given.tokens)] = torch.tensor(given.tokens)
    return padded


@torch.no_grad()
def _answers(
    stream: StreamedModel, inputs: Sequence[_Input], states: Sequence[Tensor], limit: int | None
) -> Iterator[tuple[int, tuple[float, bool]]]:
    """(request, answer) from each input's hidden states (padded length, D) after the last block.

    Of all inputs, the states whose predictions are needed are put in a line, and logits exist for a piece of it.
    """
    needed = torch.cat(
        [row[len(given.tokens) - given.scored : len(given.tokens)] for given, row in zip(inputs, states, strict=True)]
    )
    places: list[int] = []
    targets: list[int] = []
    owners: list[int] = []
    start = 0
    for given in inputs:
        start += given.scored
        for request, continuation in given.asked:
            places += range(start - len(continuation), start)
            targets += continuation
            owners += [request] * len(continuation)
    asked = torch.tensor([places, targets])
    sums: dict[int, float] = dict.fromkeys(owners, 0.0)
    greedy = dict.fromkeys(owners, True)
    size = CHUNK if limit is None else min(CHUNK, limit)
    with stream.head(torch.float32) as head:
        for first in range(0, len(needed), size):
            logits = head(needed[None, first : first + size])
            (here,) = ((asked[0] >= first) & (asked[0] < first + size)).nonzero(as_tuple=True)
            found = token_log_likelihoods(logits, asked[0, here] - first, asked[1, here])
            for place, value, likeliest in zip(here.tolist(), *(each.tolist() for each in found), strict=True):
                sums[owners[place]] += value
                greedy[owners[place]] &= likeliest
    return iter([(request, (total, greedy[request])) for request, total in sums.items()])
