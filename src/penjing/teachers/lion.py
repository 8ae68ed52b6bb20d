"""Lion's discrimination and generation with any teachers (see `methods.distillation.instructions`).

Imitation is training, as a recipe step, on the file of prompts and responses that `imitation_records` gives.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from penjing.errors import TeacherError
from penjing.methods.distillation.instructions import (
    HARD,
    gap,
    generation_prompt,
    parse_scores,
    referee_prompt,
    usable,
)
from penjing.teachers.base import Request
from penjing.teachers.collection import collect

TRIES = 5
"""How often a referee is asked until its scores can be read."""


def imitation_records(teacher: Any, instructions: Sequence[str], file: Path) -> list[dict[str, str]]:
    """The teacher's answers as records to train on; those that were cut off are left out."""
    replies = collect(teacher, [Request(instruction) for instruction in instructions], file)
    pairs = zip(instructions, replies, strict=True)
    return [{"prompt": asked, "response": reply.text} for asked, reply in pairs if reply.finished and reply.text]


def discriminate(
    instructions: Sequence[str], teacher: Sequence[str], student: Sequence[str], referee: Any, file: Path
) -> dict[str, float]:
    """Instruction -> d, from the answers of both. Raises TeacherError when the referee gives no scores."""
    gaps = {}
    for instruction, theirs, ours in zip(instructions, teacher, student, strict=True):
        forward = _scores(referee, referee_prompt(instruction, theirs, ours), file)
        backward = _scores(referee, referee_prompt(instruction, ours, theirs), file)
        gaps[instruction] = gap(forward, backward)
    return gaps


def _scores(referee: Any, prompt: str, file: Path) -> tuple[float, float]:
    for sample in range(TRIES):
        (reply,) = collect(referee, [Request(prompt, temperature=0.2, sample=sample)], file)
        if (scores := parse_scores(reply.text)) is not None:
            return scores
    raise TeacherError(
        f"{referee.name} gave no two scores from 1 to 10 in {TRIES} replies; the last: {reply.text[:100]!r}"
    )


def generate(
    gaps: Mapping[str, float], generator: Any, file: Path, count: int, seed: int = 0, tries: int = 10
) -> tuple[list[str], list[str]]:
    """New instructions, up to `count` in the manner of hard ones and as many of easy ones.

    Each comes from one instruction drawn at random; at most `tries` requests are made for each that is wanted.
    """
    draw = random.Random(seed)
    known = list(gaps)
    made: list[list[str]] = []
    for hard in (True, False):
        seeds = [instruction for instruction, difference in gaps.items() if (difference >= HARD) == hard]
        new: list[str] = []
        for attempt in range(count * tries if seeds else 0):
            asked = Request(generation_prompt(draw.choice(seeds), hard=hard), temperature=1.0, sample=attempt)
            (reply,) = collect(generator, [asked], file)
            if usable(reply.text, known, finished=reply.finished):
                new.append(reply.text.strip())
                known.append(reply.text.strip())
            if len(new) == count:
                break
        made.append(new)
    return made[0], made[1]
