"""Lion: instructions on which the student falls behind its teacher are found, and more like them are written.

Round after round,

    imitation        the student is trained on the teacher's answers to a training pool
    discrimination   both answer a cache pool; a referee scores both answers twice, in either order, and
                     d = mean score of teacher - mean score of student;    hard if d >= 1, easy if not
    generation       the generator writes new instructions in the manner of hard ones, and as many of easy ones

A referee favours the answer it reads first, so one order alone would judge places. New instructions are dropped when
they were cut off, are too short, talk about instructions, or resemble one that is known (Rouge-L above 0.7).

Source: Jiang et al. 2023, "Lion: Adversarial Distillation of Proprietary Large Language Models" (arXiv:2305.12870),
section 3, and the filters of its released code.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

HARD = 1.0
"""How much better, on a scale of 10, the teacher must be for an instruction to be hard."""


def referee_prompt(instruction: str, first: str, second: str) -> str:
    """Asks for two scores from 1 to 10, on a line of their own."""
    return (
        f"[Instruction]\n{instruction}\n\n[Answer 1]\n{first}\n\n[Answer 2]\n{second}\n\n"
        "Rate both answers for helpfulness, relevance, accuracy and level of detail, each from 1 to 10. The first line "
        "of your reply holds the two scores alone, separated by a space; do not let the order of the answers sway you."
    )


def parse_scores(text: str) -> tuple[float, float] | None:
    """The two scores of a referee's reply; None when it holds no line of two numbers from 1 to 10."""
    for line in text.strip().splitlines():
        match = re.fullmatch(r"\W*(\d+(?:\.\d+)?)[\s,/]+(\d+(?:\.\d+)?)\W*", line.strip())
        if match and all(1 <= float(score) <= 10 for score in match.groups()):
            return float(match[1]), float(match[2])
    return None


def gap(teacher_first: tuple[float, float], student_first: tuple[float, float]) -> float:
    """d from the scores (first, second) of both orders."""
    teacher = (teacher_first[0] + student_first[1]) / 2
    student = (teacher_first[1] + student_first[0]) / 2
    return teacher - student


def generation_prompt(seed: str, *, hard: bool) -> str:
    """Asks for a new instruction in the manner of `seed`."""
    manner = (
        "of the same domain and the same kind of task, but even rarer"
        if hard
        else "of the same domain and kind of task, but different in subject"
    )
    return f"Write one new task {manner}. Reply with the new task alone.\n\n[Given task]\n{seed}\n\n[New task]"


def usable(candidate: str, known: Iterable[str], *, finished: bool = True, most_alike: float = 0.7) -> bool:
    """Whether a new instruction may enter the pool of `known` ones."""
    text = candidate.strip()
    if not finished or len(text.split()) <= 3 or "instruction" in text.casefold():
        return False
    if not text[0].isascii() or not (text[0].isalnum() or text[0] in "\"'("):
        return False
    return all(rouge_l(text, other) <= most_alike for other in known)


def rouge_l(one: str, other: str) -> float:
    """F1 of the longest common subsequence of words, letters and digits in lower case; 0 for empty texts."""
    first, second = (re.findall(r"[a-z0-9]+", text.casefold()) for text in (one, other))
    common = longest_common(first, second)
    return 2 * common / (len(first) + len(second)) if common else 0.0


def longest_common(one: Sequence[str], other: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(other) + 1)
    for word in one:
        before = 0
        for place, against in enumerate(other, 1):
            above = row[place]
            row[place] = before + 1 if word == against else max(above, row[place - 1])
            before = above
    return row[-1]
