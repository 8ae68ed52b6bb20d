"""Mutual learning, early exits, cut distributions, other vocabularies, slices, sequence-level examples."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from penjing.methods.distillation.kl import forward_kl
from penjing.methods.distillation.mutual import mutual_losses
from penjing.methods.distillation.self_distillation import exit_losses
from penjing.methods.distillation.sequence_level import Answer, examples, usable
from penjing.methods.distillation.sliced import sliced_sum
from penjing.methods.distillation.soft_labels import soft_and_hard_labels
from penjing.methods.distillation.top_k import TopK, top_k, top_k_kl
from penjing.methods.distillation.uld import common_positions, matching_tokens, uld
from penjing.methods.training import IGNORED

V, T = 9, 6
LABELS = torch.arange(T)


def logits(seed, rows=T, width=V):
    return 2 * torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_students_teach_each_other_without_touching_their_teachers():
    students = [logits(seed).requires_grad_() for seed in range(3)]
    losses = mutual_losses(students, LABELS)
    peers = (forward_kl(students[0], students[1]) + forward_kl(students[0], students[2])) / 2
    assert torch.allclose(losses[0], cross_entropy(students[0], LABELS, reduction="none") + peers)
    losses[0].sum().backward()
    assert students[0].grad is not None and students[1].grad is None and students[2].grad is None
    alike = mutual_losses([logits(0), logits(0)], LABELS)
    assert torch.allclose(alike[0], cross_entropy(logits(0), LABELS, reduction="none"))
    with pytest.raises(ValueError, match="two students"):
        mutual_losses(students[:1], LABELS)


def test_exits_learn_from_the_last_layer_and_not_the_other_way():
    exits, last = [logits(1).requires_grad_(), logits(2).requires_grad_()], logits(3).requires_grad_()
    taught = sum(soft_and_hard_labels(exit, last, LABELS, 2.0, 0.5) for exit in exits) / 2
    loss = exit_losses(exits, last, LABELS)
    assert torch.allclose(loss, cross_entropy(last, LABELS, reduction="none") + taught)
    (gradient,) = torch.autograd.grad(loss.sum(), last, retain_graph=True)
    (own,) = torch.autograd.grad(cross_entropy(last, LABELS, reduction="sum"), last)
    assert torch.allclose(gradient, own)
    assert torch.equal(exit_losses([], last, LABELS), exit_losses([last], last, LABELS, alpha=1.0))


def test_a_cut_distribution_with_all_tokens_is_the_distribution():
    student, teacher = logits(1).requires_grad_(), logits(2)
    full = forward_kl(student, teacher)
    assert torch.allclose(top_k_kl(student, top_k(teacher, V)), full)
    (wanted,) = torch.autograd.grad(full.sum(), student)
    (gradient,) = torch.autograd.grad(top_k_kl(student, top_k(teacher, V + 5)).sum(), student)
    assert torch.allclose(gradient, wanted)


def test_a_cut_distribution_never_exceeds_it_and_knows_its_tail():
    student, teacher = logits(1).requires_grad_(), logits(2)
    full, before = forward_kl(student, teacher), torch.zeros(T).double()
    for k in (1, 3, 5, V - 1):
        cut = top_k_kl(student, top_k(teacher, k))
        assert (cut <= full + 1e-12).all() and (cut >= before - 1e-12).all()
        before = cut.detach()
    assert torch.autograd.gradcheck(lambda s: top_k_kl(s, top_k(teacher, 3)), student)
    p, q = torch.tensor([0.6, 0.3, 0.1]).log(), torch.tensor([0.5, 0.1, 0.4]).log()
    assert top_k_kl(q, top_k(p, 1)).item() == pytest.approx(0.0201, abs=1e-4)


def test_half_precision_and_certainty_stay_finite():
    sure = torch.full((2, V), -1e4)
    sure[:, 0] = 0
    kept = top_k(sure, 2)
    stored = TopK(kept.tokens.int(), kept.logs.half(), kept.tail.half())
    student = torch.zeros(2, V, requires_grad=True)
    loss = top_k_kl(student, stored)
    loss.sum().backward()
    assert torch.allclose(loss, torch.full((2,), math.log(V))) and torch.isfinite(student.grad).all()


def test_other_vocabularies_by_shape():
    p, q = torch.tensor([0.7, 0.3]).log(), torch.tensor([0.2, 0.5, 0.3]).log()
    assert uld(q, p).item() == pytest.approx(0.4)
    student, teacher = logits(1).requires_grad_(), logits(2, width=V + 3)
    order = torch.randperm(V + 3)
    assert torch.allclose(uld(student, teacher), uld(student, teacher[:, order])), "ids mean nothing"
    assert torch.autograd.gradcheck(lambda s: uld(s, teacher), student)
    everything = torch.arange(V)
    direct = (student.softmax(-1) - logits(2).softmax(-1)).abs().sum(-1)
    assert torch.allclose(uld(student, logits(2), (everything, everything)), direct)
    some = uld(student, teacher, matching_tokens({"a": 0, "b": 4, "c": 5}, {"b": 1, "a": 7, "z": 3}))
    q, p = student.softmax(-1), teacher.softmax(-1)
    rest = [
        sorted(q[0, [1, 2, 3, 5, 6, 7, 8]].tolist(), reverse=True),
        sorted(p[0, [0, 2, 3, 4, 5, 6, 8, 9, 10, 11]].tolist(), reverse=True),
    ]
    slow = sum(abs(a - b) for a, b in zip(rest[0] + [0] * 3, rest[1], strict=True))
    slow += float(((q[0, 0] - p[0, 7]).abs() + (q[0, 4] - p[0, 1]).abs()).detach())
    assert some[0].item() == pytest.approx(slow)


def test_positions_that_follow_the_same_text():
    assert common_positions([1, 3, 6], [2, 3, 5, 6]) == ([1, 2], [1, 3])
    assert common_positions([2, 2, 4], [2, 4]) == ([1, 2], [0, 1])
    assert common_positions([1], [2]) == ([], [])


@pytest.mark.parametrize("tokens", [1, 4, 100])
def test_slices_give_the_same_loss_and_gradients(tokens):
    head, states = torch.randn(V, 5, dtype=torch.float64, requires_grad=True), logits(1, 10, 5).requires_grad_()
    teacher = logits(2, 10)
    whole = forward_kl(states @ head.T, teacher).sum()
    wanted = torch.autograd.grad(whole, (head, states))
    seen = []

    def loss(state, target):
        seen.append(len(state))
        return forward_kl(state @ head.T, target)

    cut = sliced_sum(loss, (states, teacher), tokens)
    assert torch.allclose(cut.double(), whole, atol=1e-5)
    for gradient, expected in zip(torch.autograd.grad(cut, (head, states)), wanted, strict=True):
        assert torch.allclose(gradient, expected)
    assert max(seen) <= tokens and sum(seen) == 20, "each slice is made twice: forward and backward"
    assert sliced_sum(loss, (states[:0], teacher[:0])).item() == 0
    with pytest.raises(ValueError, match=r"\[9, 10\] rows"):
        sliced_sum(loss, (states, teacher[:9]))


def test_teacher_answers_that_can_be_used():
    kept = usable(
        [
            Answer("q", "four"),
            Answer("q", " four "),
            Answer("q", "it is", False),
            Answer("r", "a b c d"),
            Answer("s", ""),
        ],
        longest=3,
    )
    assert kept == [Answer("q", "four")]


def test_examples_learn_the_end_and_nothing_of_the_prompt():
    end = padding = 0
    tokens, attention, labels = examples([([5, 6, 7], [8]), ([5], [6, 7])], end, padding, 4)
    assert tokens.tolist() == [[6, 7, 8, 0], [5, 6, 7, 0]] and attention.tolist() == [[1] * 4, [1] * 4]
    assert labels.tolist() == [[IGNORED, IGNORED, 8, 0], [IGNORED, 6, 7, 0]]
    tokens, attention, labels = examples([([5], [8]), ([5], [6, 7, 8, 9])], end, padding, 4)
    assert tokens.tolist() == [[5, 8, 0, 0], [6, 7, 8, 9]] and attention.tolist() == [[1, 1, 1, 0], [1] * 4]
    assert labels.tolist() == [[IGNORED, 8, 0, IGNORED], [6, 7, 8, 9]]
