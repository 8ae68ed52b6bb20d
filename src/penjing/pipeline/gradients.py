"""Gradients of the model's own predictions by the outputs of its linears, in one pass forward and one back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
from torch import Tensor, nn

from penjing.models import find
from penjing.models.reading import drawn
from penjing.pipeline.stream import StreamedModel, batches, head_slices
from penjing.statistics import Gram

SEED = 0
"""Of the labels that are drawn."""

Progress = Callable[[str, int, int, str], None]

GRADIENT_WINDOWS, PROBE_LENGTH = 16, 256
"""Text that gradients are taken on, the start of the first calibration windows: some three forward passes over it."""


@dataclass(frozen=True)
class SquaredGradients:
    """Squares of the gradients that reach the outputs of one linear.

    outputs  fp64 (N,): each output's share of their sum
    tokens   fp32 (t,): their sum over outputs for every token that went through the linear, in order
    leader   the linear called just before with the very same inputs, by its name inside the block, or this one's
    """

    outputs: Tensor
    tokens: Tensor
    leader: str


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
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = SEED,
) -> dict[str, SquaredGradients]:
    """Squared gradients of log p(y | context) by the outputs of linears, on token windows (S, T).

    linears  block -> names inside it; the result has full names
    dtype    of the arithmetic inside the blocks

    Labels y are drawn from the model's predictions, so that what is expected is Fisher information. The inputs of all
    blocks are in memory at once, blocks one at a time.
    """
    blocks = stream.layout.blocks
    inputs, states = block_inputs(stream, tokens, progress, dtype)
    gradient = _by_last_states(stream, states, seed)
    found: dict[str, SquaredGradients] = {}
    for index in reversed(range(blocks)):
        prefix = f"{stream.layout.block_name(index)}."
        progress("gradients", 2 * blocks - 1 - index, 2 * blocks, stream.layout.block_name(index))
        with stream.block(index, dtype) as block, _Squares(block, linears.get(index, ())) as squares:
            for batch, flowing in zip(batches(inputs.pop()), batches(gradient), strict=True):
                leaf = batch.detach().requires_grad_()
                output = stream.run_with(block, index, leaf, {})
                flowing.copy_(torch.autograd.grad(output, leaf, flowing.clone())[0])
        for name in linears.get(index, ()):
            found[prefix + name] = squares.of(name, stream.layout.by_name[prefix + name].shape[0])
    progress("gradients", 2 * blocks, 2 * blocks, "")
    return found


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


class _Squares:
    """Squares of the gradients that reach the outputs of linears, summed while backward passes run inside."""

    def __init__(self, block: nn.Module, names: Sequence[str]) -> None:
        self._linears = {name: find(block, name) for name in names}
        self._outputs: dict[str, Tensor] = {}
        self._tokens: dict[str, list[Tensor]] = {}
        self._leaders: dict[str, str] = {}
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
        squares = gradient.reshape(-1, gradient.shape[-1]).float().square()
        outputs = squares.sum(0).double()
        self._outputs[name] = self._outputs[name] + outputs if name in self._outputs else outputs
        self._tokens.setdefault(name, []).append(squares.sum(1))

    def of(self, name: str, rows: int) -> SquaredGradients:
        """What reached a linear with that many outputs; nothing if no token did."""
        outputs = self._outputs.get(name, torch.zeros(rows, dtype=torch.float64))
        tokens = torch.cat(self._tokens.get(name, [torch.zeros(0)]))
        tiny = torch.finfo(torch.float64).tiny
        return SquaredGradients(outputs / outputs.sum().clamp(min=tiny), tokens, self._leaders.get(name, name))
