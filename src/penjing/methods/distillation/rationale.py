"""Chain of thought: a teacher's reasons as a second thing to learn, so that a small model answers better without them.

Collecting, from questions with known answers (MT-CoT):

    cote    the teacher thinks and answers; its reasons are kept if the answer is right
    rp      the teacher is told the answer and explains it
    crop    cote where that is right, rp for the rest

Learning, two examples per question, told apart by how the prompt begins:

    step-by-step   "predict: " -> answer               "explain: " -> reasons                (distilling step by step)
    mt-re          answer alone                        reasons alone
    mt-ra          answer alone                        answer, then reasons
    mt-cot         answer alone                        reasons, then answer

    L = alpha mean over answer tokens + (1 - alpha) mean over explanation tokens

each mean by itself: in one mean the long explanations would drown the answers. At inference only the first prompt is
used: reasons cost nothing then.

Sources: Hsieh et al. 2023, "Distilling Step-by-Step" (arXiv:2305.02301), eq. 3-4; Li et al. 2022, "Explanations from
Large Language Models Make Small Reasoners Better" (arXiv:2210.06726), section 3.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from penjing.methods.distillation.tokens import mean_over

Format = Literal["step-by-step", "mt-re", "mt-ra", "mt-cot"]

THINK = "Think step by step, then end with a line that begins with 'Answer:'."
PREDICT, EXPLAIN = "predict: ", "explain: "


@dataclass(frozen=True)
class Question:
    """A question and its known answer."""

    text: str
    answer: str


def thinking_prompt(question: Question) -> str:
    """What `cote` asks."""
    return f"{question.text}\n\n{THINK}"


def rationalising_prompt(question: Question) -> str:
    """What `rp` asks: the answer is given away."""
    return f"{question.text}\n\nThe answer is {question.answer}. Explain step by step why, without other answers."


def split_answer(text: str) -> tuple[str, str]:
    """Reasons and answer of a reply to `thinking_prompt`; the answer is empty when there is none."""
    parts = re.split(r"(?im)^\s*answer\s*:\s*", text.strip())
    return (parts[0].strip(), parts[-1].strip()) if len(parts) > 1 else (text.strip(), "")


def same_answer(given: str, known: str) -> bool:
    """Whether two answers are the same but for case, spaces, thousands separators and a closing full stop."""

    def plain(answer: str) -> str:
        answer = re.sub(r"(?<=\d),(?=\d{3})", "", answer.casefold().strip().rstrip("."))
        return " ".join(answer.strip("$ ").split())

    return bool(plain(known)) and plain(given) == plain(known)


def examples(question: Question, reasons: str, form: Format) -> list[dict[str, str]]:
    """Two records of prompt, response and task (`answer` or `explanation`) for training."""
    explained = {
        "step-by-step": reasons,
        "mt-re": reasons,
        "mt-ra": f"{question.answer}\n{reasons}",
        "mt-cot": f"{reasons}\nAnswer: {question.answer}",
    }[form]
    return [
        {"prompt": PREDICT + question.text, "response": question.answer, "task": "answer"},
        {"prompt": EXPLAIN + question.text, "response": explained, "task": "explanation"},
    ]


def two_task_loss(losses: Tensor, learnt: Tensor, explains: Tensor, alpha: float = 0.5) -> Tensor:
    """alpha L_answer + (1 - alpha) L_explanation: losses and bool `learnt` (B, T), bool `explains` (B,)."""
    answers, explanations = learnt & ~explains[:, None], learnt & explains[:, None]
    return alpha * mean_over(losses, answers) + (1 - alpha) * mean_over(losses, explanations)
