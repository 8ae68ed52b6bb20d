"""MiniLLM's estimate on a vocabulary small enough to write every sequence down."""

import itertools

import pytest
import torch

from penjing.methods.distillation.minillm import importance, minillm, mixed_sampling, returns, sequence_reverse_kl

V, STEPS = 3, 3


def tables(seed):
    """Logits for every prefix of up to two tokens: a language model of 1 + 3 + 9 rows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(1 + V + V * V, V, generator=generator, dtype=torch.float64)


def row(prefix):
    return {0: 0, 1: 1, 2: 1 + V}[len(prefix)] + sum(token * V**power for power, token in enumerate(reversed(prefix)))


def every_sequence(steps=STEPS):
    sequences = list(itertools.product(range(V), repeat=steps))
    rows = torch.tensor([[row(sequence[:step]) for step in range(steps)] for sequence in sequences])
    return torch.tensor(sequences), rows


def log_probabilities(table, tokens, rows):
    return table.log_softmax(-1)[rows].gather(-1, tokens[..., None]).squeeze(-1)


def exact_gradient(student, teacher, steps=STEPS):
    leaf = student.clone().requires_grad_()
    tokens, rows = every_sequence(steps)
    log_q = log_probabilities(leaf, tokens, rows).sum(1)
    log_p = log_probabilities(teacher, tokens, rows).sum(1)
    (log_q.exp() * (log_q - log_p)).sum().backward()
    return leaf.grad


def estimated_gradient(student, teacher, share, steps=STEPS):
    """The expectation of the estimate over sequences drawn from the mixture, each weighted by its probability."""
    leaf = student.clone().requires_grad_()
    tokens, rows = every_sequence(steps)
    drawn = mixed_sampling(student, teacher, share)[rows].gather(-1, tokens[..., None]).squeeze(-1).prod(1)
    for sequence, at, probability in zip(tokens, rows, drawn, strict=True):
        written = torch.ones(1, steps, dtype=torch.bool)
        loss = minillm(leaf[at][None], teacher[at][None], sequence[None], written, teacher_share=share, normalise=False)
        (probability * loss).backward()
    return leaf.grad


def test_the_estimate_is_the_gradient_of_reverse_kl():
    student, teacher = tables(0), tables(1)
    wanted = exact_gradient(student, teacher)
    assert wanted.abs().max() > 0.05
    assert torch.allclose(estimated_gradient(student, teacher, 0.0), wanted, atol=1e-12)


def test_importance_weights_correct_one_step_exactly():
    student, teacher = tables(0), tables(1)
    wanted = exact_gradient(student, teacher, steps=1)
    assert torch.allclose(estimated_gradient(student, teacher, 0.3, steps=1), wanted, atol=1e-12)
    log_q, log_p = student.log_softmax(-1), teacher.log_softmax(-1)
    drawn = mixed_sampling(student, teacher, 0.3)
    assert torch.allclose((drawn * importance(log_q, log_p, 0.3)).sum(-1), torch.ones(len(student)).double())


def test_returns_are_the_rewards_after_and_do_not_reach_into_padding():
    reward = torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 2.0, float("nan"), 9.0]])
    written = torch.tensor([[True] * 4, [True, True, False, False]])
    assert returns(reward, written, normalise=False).tolist() == [[14, 12, 8, 0], [2, 0, 0, 0]]
    assert returns(reward, written).tolist() == [[pytest.approx(14 / 3), 6, 8, 0], [2, 0, 0, 0]]


def test_prompt_and_padding_have_no_gradient():
    logits = torch.randn(1, 4, V, dtype=torch.float64, requires_grad=True)
    tokens, written = torch.tensor([[0, 1, 2, 0]]), torch.tensor([[False, True, True, False]])
    minillm(logits, torch.randn(1, 4, V, dtype=torch.float64), tokens, written).backward()
    assert (logits.grad[0, [0, 3]] == 0).all() and (logits.grad[0, 1:3] != 0).all()


@pytest.mark.parametrize("share", [0.0, 0.2])
def test_a_student_that_is_its_teacher_stays(share):
    teacher = tables(1)
    assert estimated_gradient(teacher, teacher, share).abs().max() < 1e-12


def test_following_the_estimate_lowers_the_divergence():
    student, teacher = tables(0), tables(1)
    tokens, rows = every_sequence()

    def divergence(table):
        q, p = (log_probabilities(which, tokens, rows) for which in (table, teacher))
        return float((q.sum(1).exp() * (q - p).sum(1)).sum())

    before = divergence(student)
    for _ in range(20):
        student = student - 0.5 * estimated_gradient(student, teacher, 0.0)
    assert divergence(student) < before / 2
    written = torch.ones(1, STEPS, dtype=torch.bool)
    ones = torch.zeros(1, STEPS)
    assert sequence_reverse_kl(ones, ones - 1, written).item() == STEPS
