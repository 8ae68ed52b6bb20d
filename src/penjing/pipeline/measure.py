"""Evaluation of models that are streamed block by block: perplexity, KL divergence and top-1 agreement."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from penjing.evaluation.metrics import Comparison
from penjing.pipeline.stream import StreamedModel
from penjing.progress import Progress

CHUNK = 256
"""Tokens whose logits exist at one time: 256 of a vocabulary of 128k in fp32 are 131 MB per model."""


@dataclass(frozen=True)
class Candidate:
    """A streamed model and its hidden states (S, T, D) fp32 after the last block."""

    stream: StreamedModel
    states: Tensor


def run(stream: StreamedModel, tokens: Tensor, on_block: Callable[[int], None] | None = None) -> Candidate:
    """All windows through all blocks, in fp32."""
    return Candidate(stream, stream.forward(tokens, torch.float32, on_block))


def report_block(progress: Progress, stage: str, blocks: int, index: int) -> None:
    """Tell a progress callback that block `index` is done."""
    progress(stage, index + 1, blocks, "")


def compare(candidate: Candidate, tokens: Tensor, reference: Candidate | None = None) -> Comparison:
    """Metrics of a model on token windows (S, T), against a reference model when one is given."""
    comparison = Comparison()
    with ExitStack() as stack:
        heads = [
            (each, stack.enter_context(each.stream.head(torch.float32)))
            for each in (candidate, reference)
            if each is not None
        ]
        for window in range(tokens.shape[0]):
            for start in range(0, tokens.shape[1] - 1, CHUNK):
                stop = min(start + CHUNK, tokens.shape[1] - 1)
                logits: Sequence[Tensor] = [head(each.states[window : window + 1, start:stop]) for each, head in heads]
                comparison.update(logits[0], tokens[window, start + 1 : stop + 1], *logits[1:])
    return comparison
