"""Collecting a teacher's reasons for known answers, in MT-CoT's three ways (see `methods.distillation.rationale`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from penjing.methods.distillation.rationale import (
    Question,
    rationalising_prompt,
    same_answer,
    split_answer,
    thinking_prompt,
)
from penjing.teachers.base import Request
from penjing.teachers.collection import collect

Way = Literal["cote", "rp", "crop"]


def collect_reasons(
    teacher: Any, questions: Sequence[Question], file: Path, way: Way = "crop", max_tokens: int = 512
) -> list[tuple[Question, str]]:
    """Questions with the reasons that are kept; those without are left out. Answers are kept in `file` as they come.

    Replies that were cut off are not used.
    """
    kept: dict[int, str] = {}
    if way != "rp":
        asked = [Request(thinking_prompt(question), max_tokens=max_tokens) for question in questions]
        for place, reply in enumerate(collect(teacher, asked, file)):
            reasons, answer = split_answer(reply.text)
            if reply.finished and reasons and same_answer(answer, questions[place].answer):
                kept[place] = reasons
    if way != "cote":
        rest = [place for place in range(len(questions)) if place not in kept]
        asked = [Request(rationalising_prompt(questions[place]), max_tokens=max_tokens) for place in rest]
        replies = collect(teacher, asked, file)
        kept |= {place: reply.text.strip() for place, reply in zip(rest, replies, strict=True) if reply.finished}
    return [(questions[place], kept[place]) for place in sorted(kept) if kept[place]]
