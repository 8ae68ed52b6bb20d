"""Gradients of the model's own predictions by the outputs of its linears, in one pass forward and one back."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise, product

import torch
from torch import Tensor, nn

from penjing.models import find
from penjing.models.reading import drawn
from penjing.numerics.output_feedback import output_bounds
from penjing.pipeline.stream import StreamedModel, batches, head_slices
from penjing.progress import Progress
from penjing.statistics import Gram

SEED = 0
"""Of the labels that are drawn."""

LARGEST = 20.0
"""Squared gradient at which that of a token is cut, over their mean: it comes from one label drawn per token, and
single ones are chance."""

GRADIENT_WINDOWS, PROBE_LENGTH = 16, 256
"""Text that gradients are taken on, the start of the first calibration windows: some three forward passes over it."""


class GradientGram(Gram):
    """A Gram matrix of gradients. `fourth`: the sum of the fourth powers of their lengths."""

    def __init__(self, outputs: int) -> None:
        super().__init__(outputs)
        self.fourth = 0.0

    def update(self, inputs: Tensor) -> None:
        super().update(inputs)
        self.fourth += float(inputs.float().square().sum(1).square().sum())


@dataclass(frozen=True)
class SquaredGradients:
    """Squares of the gradients that reach the outputs of one linear.

    outputs  fp64 (N,): each output's share of their sum
    tokens   fp32 (t,): their sum over outputs for every token that went through the linear, in order
    leader   the linear called just before with the very same inputs, by its name inside the block, or this one's
    grams    Gram matrices of the gradients, blocks along the diagonal (see `output_bounds`); none unless asked for
    """

    outputs: Tensor
    tokens: Tensor
    leader: str
    grams: tuple[GradientGram, ...] = ()


def block_inputs(
    stream: StreamedModel, tokens: Tensor, progress: Progress, dtype: torch.dtype = torch.float32
) -> tuple[list[Tensor], Tensor]:
    """The way forward of one pass there and back: states (S, T, D) before every block, and after the last."""
    blocks = stream.layout.blocks
    states = stream.embed(tokens, dtype)
    inputs = []
    for index in range(blocks):
        progress("gradients", index, 2 * blocks, stream.layout.block_name(index))
        inputs.append(states.clone())
        with stream.block(index, dtype) as block:
            stream.advance(block, index, states)
    return inputs, states


def squared_gradients(
    stream: StreamedModel,
    tokens: Tensor,
    linears: Mapping[int, Sequence[str]],
    progress: Progress,
) -> dict[str, SquaredGradients]:
    """What `by_block` gives in fp32, of all blocks, by full names."""
    return {
        f"{stream.layout.block_name(index)}.{name}": squares
        for index, found in by_block(stream, tokens, linears, progress)
        for name, squares in found.items()
    }


def by_block(
    stream: StreamedModel,
    tokens: Tensor,
    linears: Mapping[int, Sequence[str]],
    progress: Progress,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = SEED,
    together: Container[str] = (),
) -> Iterator[tuple[int, dict[str, SquaredGradients]]]:
    """Squared gradients of log p(y | context) by the outputs of linears, on token windows (S, T): blocks, last first.

    linears   block -> names inside it
    dtype     of the arithmetic inside the blocks
    together  linears, by full name, whose gradients' Gram matrices are wanted as well

    Labels y are drawn from the model's predictions, so that what is expected is Fisher information. The inputs of all
    blocks are in memory at once, blocks one at a time.
    """
    blocks = stream.layout.blocks
    inputs, states = block_inputs(stream, tokens, progress, dtype)
    gradient = _by_last_states(stream, states, seed)
    for index in reversed(range(blocks)):
        prefix = f"{stream.layout.block_name(index)}."
        progress("gradients", 2 * blocks - 1 - index, 2 * blocks, stream.layout.block_name(index))
        names = linears.get(index, ())
        rows = {name: stream.layout.by_name[prefix + name].shape[0] for name in names}
        grams = {name: _grams(rows[name]) for name in names if prefix + name in together}
        with stream.block(index, dtype) as block, _Squares(block, rows, grams) as squares:
            for batch, flowing in zip(batches(inputs.pop()), batches(gradient), strict=True):
                leaf = batch.detach().requires_grad_()
                output = stream.run_with(block, index, leaf, {})
                flowing.copy_(torch.autograd.grad(output, leaf, flowing.clone())[0])
        yield index, {name: squares.of(name) for name in names}
    progress("gradients", 2 * blocks, 2 * blocks, "")


def _grams(outputs: int) -> tuple[GradientGram, ...]:
    return tuple(GradientGram(stop - start) for start, stop in pairwise(output_bounds(outputs)))


def weighted_grams(
    stream: StreamedModel, index: int, states: Tensor, names: Sequence[str], gradients: Mapping[str, SquaredGradients]
) -> dict[str, Gram]:
    """Gram matrices of the inputs of linears in a block, where a token counts as much as its squared gradients.

    states     (S, T, D) before the block, of the windows that `gradients` come from; they go through the block
    names      of the linears, inside the block
    gradients  by full names
    """
    prefix = f"{stream.layout.block_name(index)}."
    grams = {name: Gram(stream.layout.by_name[prefix + name].shape[1]) for name in names}

    def see(name: str, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        inputs, gram = args[0].reshape(-1, args[0].shape[-1]), grams[name]
        weights = gradients[prefix + name].tokens[gram.tokens : gram.tokens + len(inputs)]
        gram.update(inputs * weights.sqrt().unsqueeze(1))

    with stream.block(index, torch.float32) as block:
        hooks = [find(block, name).register_forward_pre_hook(partial(see, name)) for name in names]
        stream.advance(block, index, states)
        for hook in hooks:
            hook.remove()
    return grams


def _by_last_states(stream: StreamedModel, states: Tensor, seed: int) -> Tensor:
    """Gradient of the summed log-likelihood of drawn labels by the states (S, T, D) after the last block."""
    generator = torch.Generator().manual_seed(seed)
    gradient = torch.empty_like(states)
    with stream.head(states.dtype) as logits:
        for window, at in product(range(len(states)), head_slices(states.shape[1])):
            leaf = states[window : window + 1, at].detach().requires_grad_()
            scores = logits(leaf)
            by_scores = torch.softmax(scores.detach(), 1)  # d log p(y) / d z = one-hot(y) - p
            labels = drawn(by_scores, generator).unsqueeze(1)
            by_scores.neg_().scatter_add_(1, labels, torch.ones_like(labels, dtype=by_scores.dtype))
            gradient[window, at] = torch.autograd.grad(scores, leaf, by_scores)[0][0]
    return gradient


def _cut(squares: Tensor) -> Tensor:
    """What makes `squares` (t,) at most `LARGEST` times their mean when they are multiplied by it (t,)."""
    limit = LARGEST * squares.mean()
    return torch.where(squares > limit, limit / squares, 1)


class _Squares:
    """Squares of the gradients that reach the outputs of linears, summed while backward passes run inside.

    rows   name inside the block -> number of outputs N
    grams  to be fed, of some of them
    """

    def __init__(
        self, block: nn.Module, rows: Mapping[str, int], grams: Mapping[str, tuple[GradientGram, ...]]
    ) -> None:
        self._rows, self._grams = rows, grams
        self._linears = {name: find(block, name) for name in rows}
        self._outputs = {name: torch.zeros(count, dtype=torch.float64) for name, count in rows.items()}
        self._tokens: dict[str, list[Tensor]] = {name: [torch.zeros(0)] for name in rows}
        self._leaders = {name: name for name in rows}
        self._last: tuple[str, Tensor] | None = None

    def __enter__(self) -> _Squares:
        self._hooks = [
            linear.register_forward_hook(partial(self._watch, name)) for name, linear in self._linears.items()
        ]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._last = None

    def _watch(self, name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        if self._last is None or self._last[1] is not args[0]:
            self._last = name, args[0]
        self._leaders[name] = self._last[0]
        output.register_hook(partial(self._add, name))

    def _add(self, name: str, gradient: Tensor) -> None:
        gradient = gradient.reshape(-1, gradient.shape[-1])
        squares = gradient.float().square()
        self._outputs[name] += squares.sum(0).double()
        of_token = squares.sum(1)
        self._tokens[name].append(of_token)
        if name in self._grams:
            cut = gradient * _cut(of_token).sqrt().unsqueeze(1).to(gradient.dtype)
            bounds = pairwise(output_bounds(self._rows[name]))
            for gram, (start, stop) in zip(self._grams[name], bounds, strict=True):
                gram.update(cut[:, start:stop])

    def of(self, name: str) -> SquaredGradients:
        """What reached a linear; nothing if no token did."""
        outputs, tokens = self._outputs[name], torch.cat(self._tokens[name])
        tiny = torch.finfo(torch.float64).tiny
        shares = outputs / outputs.sum().clamp(min=tiny)
        return SquaredGradients(shares, tokens, self._leaders[name], self._grams.get(name, ()))
