"""Gradients of the model's own predictions by the outputs of its linears, in one pass forward and one back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from penjing.models import find
from penjing.pipeline.stream import StreamedModel, batches
from penjing.statistics import Gram

SEED = 0
"""Of the labels that are drawn."""

GRADIENT_WINDOWS, PROBE_LENGTH = 16, 256
"""Text that gradients are taken on, the start of the first calibration windows: some three forward passes over it."""


@dataclass(frozen=True)
class SquaredGradients:
    """Squares of the gradients that reach the outputs of one linear.

    outputs  fp64 (N,): each output's share of their sum
    tokens   fp32 (t,): their sum over outputs for every token that went through the linear, in order
    """

    outputs: Tensor
    tokens: Tensor


def block_inputs(
    stream: StreamedModel, tokens: Tensor, progress: Callable[[str, int, int, str], None]
) -> tuple[list[Tensor], Tensor]:
    """The way forward of one pass there and back: states (S, T, D) before every block, and after the last, in fp32."""
    blocks = stream.layout.blocks
    states = stream.embed(tokens, torch.float32)
    inputs = []
    for index in range(blocks):
        progress("gradients", index, 2 * blocks, stream.layout.block_name(index))
        inputs.append(states.clone())
        with stream.block(index, torch.float32) as block:
            stream.advance(block, index, states)
    return inputs, states


def squared_gradients(
    stream: StreamedModel,
    tokens: Tensor,
    linears: Mapping[int, Sequence[str]],
    progress: Callable[[str, int, int, str], None],
) -> dict[str, SquaredGradients]:
    """Squared gradients of log p(y | context) by the outputs of linears, on token windows (S, T).

    linears  block -> names inside it; the result has full names

    Labels y are drawn from the model's predictions, so that what is expected is Fisher information. The inputs of all
    blocks are in memory at once, blocks one at a time.
    """
    blocks = stream.layout.blocks
    inputs, states = block_inputs(stream, tokens, progress)
    gradient = _by_last_states(stream, states)
    found: dict[str, SquaredGradients] = {}
    for index in reversed(range(blocks)):
        prefix = f"{stream.layout.block_name(index)}."
        progress("gradients", 2 * blocks - 1 - index, 2 * blocks, stream.layout.block_name(index))
        with stream.block(index, torch.float32) as block, _squares(block, linears.get(index, ())) as squares:
            for batch, flowing in zip(batches(inputs.pop()), batches(gradient), strict=True):
                leaf = batch.detach().requires_grad_()
                output = stream.run_with(block, index, leaf, {})
                flowing.copy_(torch.autograd.grad(output, leaf, flowing.clone())[0])
        for name in linears.get(index, ()):
            never = torch.zeros(0, stream.layout.by_name[prefix + name].shape[0])
            found[prefix + name] = _summed(squares.get(name, [never]))
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


def _summed(squares: Sequence[Tensor]) -> SquaredGradients:
    outputs = sum((part.sum(0, dtype=torch.float64) for part in squares), torch.zeros(()))
    tiny = torch.finfo(torch.float64).tiny
    return SquaredGradients(outputs / outputs.sum().clamp(min=tiny), torch.cat([part.sum(1) for part in squares]))


def _by_last_states(stream: StreamedModel, states: Tensor) -> Tensor:
    """Gradient of the summed log-likelihood of drawn labels by the states (S, T, D) after the last block."""
    generator = torch.Generator().manual_seed(SEED)
    gradient = torch.empty_like(states)
    with stream.head(torch.float32) as logits:
        for window, place in zip(states, gradient, strict=True):
            leaf = window.unsqueeze(0).detach().requires_grad_()
            log_p = torch.log_softmax(logits(leaf), 1)
            labels = torch.multinomial(log_p.detach().exp(), 1, generator=generator)
            place.copy_(torch.autograd.grad(log_p.gather(1, labels).sum(), leaf)[0][0])
    return gradient


@contextmanager
def _squares(block: nn.Module, names: Sequence[str]) -> Iterator[dict[str, list[Tensor]]]:
    """Squares (t, N) of the gradients that reach the outputs of linears: filled while a backward pass runs."""
    found: dict[str, list[Tensor]] = {}

    def add(name: str, gradient: Tensor) -> None:
        found.setdefault(name, []).append(gradient.reshape(-1, gradient.shape[-1]).square())

    def watch(name: str, module: nn.Module, args: tuple[object, ...], output: Tensor) -> None:
        output.register_hook(partial(add, name))

    hooks = [find(block, name).register_forward_hook(partial(watch, name)) for name in names]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
