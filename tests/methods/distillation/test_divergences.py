"""Losses on distributions against sums written out in fp64, their closed-form gradients, and what masks leave out."""

import math

import pytest
import torch

from penjing.methods.distillation.jsd import generalised_jsd, own_batches
from penjing.methods.distillation.kl import forward_kl, reverse_kl
from penjing.methods.distillation.skewed_kl import log_mixture, share_of_own, skewed_forward_kl, skewed_reverse_kl
from penjing.methods.distillation.soft_labels import soft_and_hard_labels, soft_labels
from penjing.methods.distillation.tokens import cross_entropy, masked_labels, mean_over, predictions
from penjing.methods.training import IGNORED

V, T = 7, 5


def logits(seed, rows=T, dtype=torch.float64):
    return 2 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def naive_kl(first, second):
    return sum(a * (math.log(a) - math.log(b)) for a, b in zip(first, second, strict=True) if a > 0)


def softmax(row):
    weights = [math.exp(value) for value in row]
    return [weight / sum(weights) for weight in weights]


def mixed(a, first, second):
    return [a * x + (1 - a) * y for x, y in zip(first, second, strict=True)]


NAIVE = {
    "forward": (forward_kl, lambda q, p: naive_kl(p, q)),
    "reverse": (reverse_kl, lambda q, p: naive_kl(q, p)),
    "skewed-forward": (lambda s, t: skewed_forward_kl(s, t, 0.1), lambda q, p: naive_kl(p, mixed(0.1, p, q))),
    "skewed-reverse": (lambda s, t: skewed_reverse_kl(s, t, 0.1), lambda q, p: naive_kl(q, mixed(0.1, q, p))),
} | {
    f"jsd-{beta}": (
        lambda s, t, beta=beta: generalised_jsd(s, t, beta),
        lambda q, p, beta=beta: beta * naive_kl(p, mixed(beta, p, q)) + (1 - beta) * naive_kl(q, mixed(beta, p, q)),
    )
    for beta in (0.1, 0.5, 0.9)
}


@pytest.mark.parametrize("name", NAIVE)
def test_value_gradient_and_zero(name):
    loss, slow = NAIVE[name]
    student, teacher = logits(1).requires_grad_(), logits(2).requires_grad_()
    wanted = [slow(softmax(q), softmax(p)) for q, p in zip(student.tolist(), teacher.tolist(), strict=True)]
    assert torch.allclose(loss(student, teacher), torch.tensor(wanted, dtype=torch.float64), atol=1e-12)
    assert torch.autograd.gradcheck(lambda s: loss(s, logits(2)), student)
    loss(student, teacher).sum().backward()
    assert teacher.grad is None, "the teacher is not trained"
    assert loss(teacher, teacher).abs().max() < 1e-12


def test_closed_forms():
    student, teacher, labels = logits(1).requires_grad_(), logits(2), torch.arange(T)
    p, q = teacher.softmax(-1), student.detach().softmax(-1)
    (gradient,) = torch.autograd.grad(forward_kl(student, teacher).sum(), student)
    assert torch.allclose(gradient, q - p)
    (gradient,) = torch.autograd.grad(reverse_kl(student, teacher).sum(), student)
    ratio = q.log() - p.log()
    assert torch.allclose(gradient, q * (ratio - (q * ratio).sum(-1, keepdim=True)))
    temperature, alpha = 3.0, 0.3
    loss = soft_and_hard_labels(student, teacher, labels, temperature, alpha)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    soft = (student.detach() / temperature).softmax(-1) - (teacher / temperature).softmax(-1)
    hard = q - torch.nn.functional.one_hot(labels, V)
    assert torch.allclose(gradient, alpha * temperature * soft + (1 - alpha) * hard)


def test_worked_examples():
    assert soft_labels(torch.zeros(2), torch.tensor([2.0, 0.0]), 2.0).item() == pytest.approx(0.4438, abs=1e-4)
    p, q = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25]).log()
    assert forward_kl(q, p).item() == pytest.approx(0.1438, abs=1e-4)
    assert reverse_kl(q, p).item() == pytest.approx(0.1308, abs=1e-4)
    one, other = torch.tensor([0.0, -math.inf]), torch.tensor([-100.0, 0.0])
    assert skewed_forward_kl(other, one, 0.5).item() == pytest.approx(math.log(2))
    assert generalised_jsd(other, one, 0.5).item() == pytest.approx(math.log(2))
    assert forward_kl(torch.zeros(3), torch.tensor([0.0, 0.0, -math.inf])).item() == pytest.approx(math.log(1.5))


def test_limits_and_bounds():
    student, teacher = logits(1), logits(2)
    assert torch.equal(generalised_jsd(student, teacher, 0), forward_kl(student, teacher))
    assert torch.equal(generalised_jsd(student, teacher, 1), reverse_kl(student, teacher))
    near = generalised_jsd(student, teacher, 1e-6) / 1e-6
    assert torch.allclose(near, forward_kl(student, teacher), rtol=1e-4), "beta is the weight of the teacher"
    assert torch.allclose(skewed_forward_kl(student, teacher, 0.0), forward_kl(student, teacher), rtol=1e-12)
    assert (skewed_forward_kl(100 * student, 100 * teacher, 0.1) <= -math.log(0.1) + 1e-9).all()
    assert torch.equal(log_mixture(student, teacher, 0), teacher) and torch.equal(
        log_mixture(student, teacher, 1), student
    )


def test_unlikely_tokens_and_half_precision_are_summed_in_fp32():
    student, teacher = logits(1, dtype=torch.bfloat16), logits(2, dtype=torch.bfloat16)
    assert forward_kl(student, teacher).dtype == torch.float32
    far = torch.tensor([0.0, -200.0])
    for loss in (forward_kl, reverse_kl, generalised_jsd, skewed_forward_kl, skewed_reverse_kl):
        leaf = far.flip(0).requires_grad_()
        value = loss(leaf, far)
        value.backward()
        assert torch.isfinite(value) and torch.isfinite(leaf.grad).all()


def test_masks_keep_the_end_of_text_and_drop_prompt_and_padding():
    end = padding = 2
    tokens = torch.tensor([[5, 6, 7, end, padding], [5, 6, 7, 8, end]])
    attention = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    labels = masked_labels(tokens, attention, torch.tensor([2, 1]))
    assert labels.tolist() == [[IGNORED, IGNORED, 7, end, IGNORED], [IGNORED, 6, 7, 8, end]]
    at, wanted = predictions(labels)
    assert at.tolist() == [[False, True, True, False, False], [True, True, True, True, False]]
    assert wanted.tolist() == [7, end, 6, 7, 8, end]
    assert masked_labels(tokens, attention)[0].tolist() == [5, 6, 7, end, IGNORED]


def test_mean_ignores_what_does_not_count_even_nan():
    values = torch.tensor([1.0, math.nan, 3.0], requires_grad=True)
    mean = mean_over(values, torch.tensor([True, False, True]))
    mean.backward()
    assert mean.item() == 2 and values.grad.tolist() == [0.5, 0, 0.5]
    assert mean_over(torch.zeros(0)).item() == 0 and mean_over(torch.ones(2), torch.zeros(2, dtype=bool)).item() == 0


def test_micro_batches_add_up_with_the_count_of_them_all():
    student, labels = logits(1), torch.arange(T)
    losses = cross_entropy(student, labels)
    parts = sum(mean_over(part, count=T) for part in losses.split([1, 4]))
    assert torch.allclose(parts, losses.mean())


def test_choices_of_batches():
    assert own_batches(50, 0.5, 1) == own_batches(50, 0.5, 1) != own_batches(50, 0.5, 2)
    assert not any(own_batches(20, 0.0, 0)) and all(own_batches(20, 1.0, 0))
    assert share_of_own(0.2, before=1.0, now=1.1) == pytest.approx(0.3)
    assert share_of_own(0.2, before=1.1, now=1.0) == 0.2 and share_of_own(0.95, 1.0, 2.0) == 1.0
