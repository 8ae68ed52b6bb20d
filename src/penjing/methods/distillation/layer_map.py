"""Which layers of the teacher a student of fewer layers starts from, or looks at.

Starting from layers of the teacher (DistilBERT) spares most of the training. `spread` takes layers at equal distances,
the first and the last among them; for 12 -> 6 that is DistilBERT's own list:

    teacher layer of student layer i  =  round(i (N - 1) / (M - 1))            [0, 2, 4, 7, 9, 11]

For transfer layer by layer (TinyBERT) layer m of the student, counted from 1, looks at layer g(m) = m N / M of the
teacher, the last of its share; layer 0 is the embedding in both:

    12 -> 4:   g = (0), 3, 6, 9, 12

Sources: Sanh et al. 2019, "DistilBERT" (arXiv:1910.01108), section 3; Jiao et al. 2020, "TinyBERT" (arXiv:1909.10351),
section 3.1.
"""

from __future__ import annotations

from typing import Literal

LayerChoice = Literal["spread", "first", "last", "middle-out"]


def select_layers(teacher: int, student: int, choice: LayerChoice = "spread") -> list[int]:
    """Indices, sorted, of the `student` layers that are taken out of `teacher`.

    spread      at equal distances, first and last among them; a single one is the first
    first       those nearest the embedding        last    those nearest the head
    middle-out  a gap in the middle: half from either end (the middle layers of a decoder change least)

    Raises ValueError unless 1 <= student <= teacher.
    """
    if not 1 <= student <= teacher:
        raise ValueError(f"{student} layers cannot be taken out of {teacher}")
    if choice == "first":
        return list(range(student))
    if choice == "last":
        return list(range(teacher - student, teacher))
    if choice == "middle-out":
        front = (student + 1) // 2
        return [*range(front), *range(teacher - (student - front), teacher)]
    if student == 1:
        return [0]
    return [(2 * index * (teacher - 1) + student - 1) // (2 * (student - 1)) for index in range(student)]


def watched_states(teacher: int, student: int) -> list[int]:
    """g(m) for m = 0..M: the teacher's hidden state that each of the student's looks at; state 0 is the embedding.

    Where M does not divide N, the nearest below.
    """
    return [layer * teacher // student for layer in range(student + 1)]


def watched_layers(teacher: int, student: int) -> list[int]:
    """For each layer of the student, from 0, the layer of the teacher whose attention it looks at: g(m) - 1."""
    return [state - 1 for state in watched_states(teacher, student)[1:]]
