"""What the model loses without each of its blocks: the KL divergence, measured, one block at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from penjing.evaluation.metrics import Comparison
from penjing.pipeline.stream import StreamedModel
from penjing.progress import Progress


def losses_without(stream: StreamedModel, tokens: Tensor, progress: Progress) -> list[float]:
    """KL(dense || without block l) in nats per token, for every l: windows (S, T) of tokens.

    One walk. A model without a block is the dense one up to it, so it costs what comes after: some L / 2 forward passes
    in all, and the hidden states of L + 1 models at once.
    """
    blocks = stream.layout.blocks
    dense = stream.embed(tokens, torch.float32)
    shorter: list[Tensor] = []
    for index in range(blocks):
        progress("measure removals", index, blocks, stream.layout.block_name(index))
        skipped = dense.clone()
        with stream.block(index, torch.float32) as block:
            for states in (*shorter, dense):
                stream.advance(block, index, states)
        shorter.append(skipped)
    measured = [Comparison() for _ in shorter]
    with stream.head(torch.float32) as logits:
        for window in range(len(tokens)):
            place, targets = slice(window, window + 1), tokens[window, 1:]
            reference = logits(dense[place])[:-1]
            for comparison, states in zip(measured, shorter, strict=True):
                comparison.update(logits(states[place])[:-1], targets, reference)
    progress("measure removals", blocks, blocks, "")
    return [float(comparison.result().kl or 0.0) for comparison in measured]
