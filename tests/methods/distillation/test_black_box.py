"""Rationales, in-context episodes and instructions: what is asked, what is kept, what is learnt."""

import random

import pytest
import torch

from penjing.methods.distillation import instructions
from penjing.methods.distillation.in_context import episode, episodes, meta_split, prompt_of, teacher_weight
from penjing.methods.distillation.rationale import Question, examples, same_answer, split_answer, two_task_loss


def test_reasons_and_answers_are_told_apart():
    assert split_answer("2 + 2\nis 4.\nAnswer: 4") == ("2 + 2\nis 4.", "4")
    assert split_answer("ANSWER : 1\nno\nAnswer:2 ") == ("", "2")
    assert split_answer("I do not know") == ("I do not know", "")
    assert same_answer(" $1,234. ", "1234") and same_answer("Blue  Sky", "blue sky")
    assert not same_answer("12", "1") and not same_answer("", "") and not same_answer("1,2", "12")


def test_two_examples_per_question():
    question = Question("How many?", "4")
    for form, wanted in {
        "step-by-step": "because",
        "mt-re": "because",
        "mt-ra": "4\nbecause",
        "mt-cot": "because\nAnswer: 4",
    }.items():
        answer, explanation = examples(question, "because", form)
        assert answer == {"prompt": "predict: How many?", "response": "4", "task": "answer"}
        assert explanation["prompt"].startswith("explain: ") and explanation["response"] == wanted


def test_long_explanations_do_not_drown_answers():
    losses = torch.tensor([[4.0, 9.0, 9.0, 9.0], [1.0, 2.0, 3.0, 9.0]])
    learnt = torch.tensor([[True, False, False, False], [True, True, True, False]])
    loss = two_task_loss(losses, learnt, torch.tensor([False, True]), alpha=0.25)
    assert loss.item() == pytest.approx(0.25 * 4 + 0.75 * 2)


def test_the_query_is_not_among_its_examples():
    pool = [(f"q{number}", f"a{number}") for number in range(6)] + [("q0", "a0")]
    for query in range(7):
        made = episode("t", pool, query, 16, random.Random(query))
        question, answer = pool[query]
        assert made.answer == answer and made.prompt.endswith(f"{question}\n")
        assert made.prompt.count(f"{question}\n") == 1 and len(made.prompt.split("\n\n")) == (
            6 if query % 6 == 0 else 7
        )


def test_examples_go_before_the_query_does():
    pool = [(f"question {number}", "yes") for number in range(9)]
    full = episode("t", pool, 0, 4, random.Random(1))
    short = episode("t", pool, 0, 4, random.Random(1), longest=40)
    assert full.prompt.endswith(short.prompt) and 0 < len(short.prompt) <= 40
    assert episode("t", pool, 0, 4, random.Random(1), longest=3).prompt == prompt_of([], "question 0")


def test_tasks_are_split_and_weights_fall():
    made = episodes({"a": [("x", "1"), ("y", "2")], "b": [("z", "3")]}, k=1)
    assert sorted(one.task for one in made) == ["a", "a", "b"] and made == episodes(
        {"a": [("x", "1"), ("y", "2")], "b": [("z", "3")]}, k=1
    )
    train, judged = meta_split(["a", "b", "c", "d"], 0.5)
    assert len(train) == len(judged) == 2 and not set(train) & set(judged)
    with pytest.raises(ValueError, match="two tasks"):
        meta_split(["a"], 0.5)
    assert [teacher_weight(step, 5) for step in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("8 7", (8, 7)), ("Scores:\n 8.5, 7\nbecause 3 4", (8.5, 7)), ("8 11", None), ("eight seven", None), ("", None)],
)
def test_scores_are_read_or_refused(text, wanted):
    assert instructions.parse_scores(text) == wanted


def test_a_referee_that_favours_the_first_is_evened_out():
    assert instructions.gap((8, 6), (8, 6)) == 0
    assert instructions.gap((9, 5), (6, 8)) == pytest.approx((9 + 8) / 2 - (5 + 6) / 2)


def test_filters():
    known = ["Write a poem about the old pine tree in a pot."]
    good = "Explain how bees find their way home"
    assert instructions.usable(good, known)
    for bad in (
        "Too short now",
        "Give an instruction for baking bread",
        known[0] + " please",
        "- Explain how bees",
        "",
    ):
        assert not instructions.usable(bad, known), bad
    assert not instructions.usable(good, known, finished=False)


def test_rouge_by_hand():
    assert instructions.rouge_l("the cat sat", "the cat sat") == 1
    assert instructions.rouge_l("the cat sat down", "a cat sat") == pytest.approx(2 * 2 / 7)
    assert instructions.rouge_l("", "a") == 0
    assert instructions.longest_common("abcbdab", "bdcaba") == 4
