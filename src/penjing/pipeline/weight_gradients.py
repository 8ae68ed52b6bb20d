"""Gradients of the text's loss by the weights of linears: one pass forward and one back, a block at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from penjing.methods.pruning.taylor import WeightGradients
from penjing.models import find
from penjing.pipeline.gradients import block_inputs
from penjing.pipeline.stream import StreamedModel
from penjing.progress import Progress

Windows = Iterator[Mapping[str, Tensor]]
"""Window after window, gradients by the weights of linears as the live modules hold them, by name in the block. A
linear that no token of a window reached (an expert's) is left out."""

Take = Callable[[int, nn.Module, Windows], None]
"""What is done with a block, its number, and its gradients, of which it must take all."""


def backward(
    stream: StreamedModel,
    tokens: Tensor,
    linears: Sequence[Sequence[str]],
    take: Take,
    progress: Progress,
) -> None:
    """Call `take` on every block, from the last to the first of which something is asked.

    linears  of each block, by name inside it

    The loss is the negative log-likelihood of each token window (S, T), mean over its tokens. The inputs of all
    blocks are in memory at once, blocks one at a time.
    """
    blocks = stream.layout.blocks
    inputs, states = block_inputs(stream, tokens, progress)
    flowing = _by_last_states(stream, tokens, states)
    for index in reversed(range(blocks)):
        if not any(linears[: index + 1]):
            break
        progress("gradients", 2 * blocks - 1 - index, 2 * blocks, stream.layout.block_name(index))
        with stream.block(index, torch.float32) as block:
            take(index, block, _windows(stream, block, index, linears[index], inputs.pop(), flowing))
    progress("gradients", 2 * blocks, 2 * blocks, "")


def over_windows(windows: Windows, linears: Mapping[str, Tensor]) -> dict[str, WeightGradients]:
    """Means over windows, for linears given by name with a tensor of the weight's shape."""
    sums = {name: [torch.zeros_like(weight) for _ in range(3)] for name, weight in linears.items()}
    count = 0
    for found in windows:
        count += 1
        for name, gradient in found.items():
            for total, part in zip(sums[name], (gradient, gradient.abs(), gradient.square()), strict=True):
                total += part
    return {name: WeightGradients(*(total.div_(count) for total in totals)) for name, totals in sums.items()}


def _by_last_states(stream: StreamedModel, tokens: Tensor, states: Tensor) -> Tensor:
    """Gradient of each window's loss by the states (S, T, D) after the last block."""
    gradient = torch.empty_like(states)
    with stream.head(torch.float32) as logits:
        for window, ids, place in zip(states, tokens, gradient, strict=True):
            leaf = window.unsqueeze(0).detach().requires_grad_()
            loss = nn.functional.cross_entropy(logits(leaf)[:-1], ids[1:])
            place.copy_(torch.autograd.grad(loss, leaf)[0][0])
    return gradient


def _windows(
    stream: StreamedModel, block: nn.Module, index: int, linears: Sequence[str], inputs: Tensor, flowing: Tensor
) -> Windows:
    """Inputs (S, T, D), and the gradient by the outputs, which becomes that by the inputs window after window."""
    leaves = {name: find(block, name).get_parameter("weight").detach().requires_grad_() for name in linears}
    parameters = {f"{name}.weight": leaf for name, leaf in leaves.items()}
    for window, gradient in zip(inputs.split(1), flowing.split(1), strict=True):
        leaf = window.detach().requires_grad_()
        output = stream.run_with(block, index, leaf, parameters)
        found = torch.autograd.grad(output, [leaf, *leaves.values()], gradient.clone(), allow_unused=True)
        gradient.copy_(found[0])
        yield {name: part for name, part in zip(leaves, found[1:], strict=True) if part is not None}
