"""In-context learning distillation: a small model learns to learn from the examples in its prompt, as a large one does.

A prompt holds k solved examples of a task, then a query; teacher and student see the same prompt, and only the query's
answer is learnt:

    L = L_icl + beta L_lm,        each  s KL(teacher || student) + (1 - s) CE(answer),        s falls from 1 to 0

L_lm is the same on ordinary text. Meta training takes queries from many tasks and is judged on tasks it never saw;
multitask training takes them from the target tasks themselves. The query never stands among its own examples, and it
is examples that go when the prompt is too long, the first ones first.

Source: Huang et al. 2022, "In-context Learning Distillation" (arXiv:2212.10670), section 3.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Pair = tuple[str, str]
"""A question and its answer."""


@dataclass(frozen=True)
class Episode:
    """One prompt of examples and a query, and the answer to be learnt."""

    task: str
    prompt: str
    answer: str

    def record(self) -> dict[str, str]:
        """As a line of a file of pairs."""
        return {"prompt": self.prompt, "response": self.answer, "task": self.task}


def prompt_of(examples: Sequence[Pair], query: str) -> str:
    """Solved examples and the query, a blank line between them; the same for teacher and student."""
    return "\n\n".join([*(f"{question}\n{answer}" for question, answer in examples), f"{query}\n"])


def episode(
    task: str, pool: Sequence[Pair], query: int, k: int, generator: random.Random, longest: int | None = None
) -> Episode:
    """The `query`-th pair of a task's pool behind `k` others drawn at random (fewer where there are fewer).

    longest  characters of the prompt: examples are dropped from its beginning until it fits; the query always stays
    """
    question, answer = pool[query]
    others = [pair for place, pair in enumerate(pool) if place != query and pair != pool[query]]
    examples = generator.sample(others, min(k, len(others)))
    while longest is not None and examples and len(prompt_of(examples, question)) > longest:
        examples.pop(0)
    return Episode(task, prompt_of(examples, question), answer)


def episodes(
    tasks: Mapping[str, Sequence[Pair]], k: int = 16, seed: int = 0, longest: int | None = None
) -> list[Episode]:
    """An episode for every pair of every task, in an order that `seed` decides."""
    generator = random.Random(seed)
    made = [
        episode(task, pool, query, k, generator, longest) for task, pool in tasks.items() for query in range(len(pool))
    ]
    generator.shuffle(made)
    return made


def meta_split(tasks: Sequence[str], held_out: float, seed: int = 0) -> tuple[list[str], list[str]]:
    """Tasks to train on and tasks to be judged on, none in both; at least one of each. ValueError for fewer than 2."""
    if len(tasks) < 2:
        raise ValueError("meta training needs two tasks or more: one to train on and one to be judged on")
    order = random.Random(seed).sample(sorted(tasks), len(tasks))
    count = min(len(order) - 1, max(1, round(held_out * len(order))))
    return sorted(order[count:]), sorted(order[:count])


def teacher_weight(step: int, steps: int) -> float:
    """s at `step` of `steps`: all teacher at first, all labels at last."""
    return 1.0 - step / max(1, steps - 1)
