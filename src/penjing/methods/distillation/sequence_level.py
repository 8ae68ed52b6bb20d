"""Sequence-level distillation: learn from what the teacher writes as if it were the truth.

The teacher answers every prompt, greedily or by beam search (the mode of its distribution, as in the paper) or by
sampling; answers that cannot be right are dropped; the student is trained on the rest with plain cross entropy over the
answer alone. The end-of-text token is part of the answer: a student that never saw it never stops.

Source: Kim, Rush 2016, "Sequence-Level Knowledge Distillation" (arXiv:1606.07947), section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from penjing.methods.training import IGNORED


@dataclass(frozen=True)
class Answer:
    """What a teacher wrote.

    finished  it ended by itself, not at the limit of tokens
    """

    prompt: str
    text: str
    finished: bool = True


def usable(answers: Iterable[Answer], shortest: int = 1, longest: int | None = None) -> list[Answer]:
    """Answers that ended by themselves, of so many words, each prompt and text once; in order."""
    seen: set[tuple[str, str]] = set()
    kept = []
    for answer in answers:
        words, key = len(answer.text.split()), (answer.prompt, answer.text.strip())
        fits = words >= shortest and (longest is None or words <= longest)
        if answer.finished and fits and key not in seen:
            seen.add(key)
            kept.append(answer)
    return kept


def examples(
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]], end: int, padding: int, length: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, attention mask and labels, each int64 (B, T), T <= `length`, padded on the right.

    pairs  token ids of a prompt and its answer; the prompt loses its beginning when both are too long, never the end
           of the answer unless the answer alone is too long

    The `end` token follows every answer that fits and is learnt; prompts and padding have the label `IGNORED`.
    """
    rows = []
    for prompt, answer in pairs:
        written = [*answer, end][:length]
        read = list(prompt)[max(0, len(prompt) + len(written) - length) :]
        rows.append((read, written))
    width = max(len(read) + len(written) for read, written in rows)
    tokens, labels = (torch.full((len(rows), width), value) for value in (padding, IGNORED))
    attention = torch.zeros_like(tokens)
    for row, (read, written) in enumerate(rows):
        used = len(read) + len(written)
        tokens[row, :used] = torch.tensor([*read, *written])
        labels[row, len(read) : used] = torch.tensor(written)
        attention[row, :used] = 1
    return tokens, attention, labels
