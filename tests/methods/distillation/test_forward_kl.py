"""The divergence of logits and its closed-form gradient, against the definition in fp64 and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from penjing.methods.distillation.kl import forward_kl


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("shape", [(7,), (3, 7), (3, 200, 2500)])
def test_value_and_gradient_are_those_of_the_definition(shape, temperature):
    teacher = torch.randn(shape, requires_grad=True)
    student = torch.randn(shape, requires_grad=True)
    p, log_q = (teacher.double() / temperature).softmax(-1), (student.double() / temperature).log_softmax(-1)
    expected = (p * (p.log() - log_q)).sum(-1)
    weights = torch.randn(shape[:-1])
    (wanted,) = torch.autograd.grad((expected * weights).sum(), student)
    found = forward_kl(student, teacher, temperature)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
    (found * weights).sum().backward()
    torch.testing.assert_close(student.grad, wanted.float(), rtol=1e-4, atol=1e-7)
    assert teacher.grad is None


def test_finite_differences_in_fp64():
    student, teacher = torch.randn(4, 5, dtype=torch.float64, requires_grad=True), torch.randn(4, 5).double()
    assert torch.autograd.gradcheck(lambda logits: forward_kl(logits, teacher, 1.7), student)


def test_what_the_teacher_excludes_counts_nothing():
    infinite = -math.inf
    teacher = torch.tensor([[0.0, 0.0, infinite], [0.0, 0.0, infinite], [0.0, 0.0, 0.0]])
    student = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, infinite], [0.0, 0.0, infinite]], requires_grad=True)
    values = forward_kl(student, teacher)
    torch.testing.assert_close(values, torch.tensor([math.log(1.5), 0.0, math.inf]))
    values[:2].sum().backward()
    torch.testing.assert_close(student.grad, torch.tensor([[-1 / 6, -1 / 6, 1 / 3], [0.0] * 3, [0.0] * 3]))


def test_half_precision_and_nothing():
    student = torch.randn(3, 9).bfloat16().requires_grad_()
    values = forward_kl(student, torch.randn(3, 9).bfloat16())
    values.mean().backward()
    assert values.dtype == torch.float32 and student.grad is not None and student.grad.dtype == torch.bfloat16
    assert forward_kl(torch.zeros(0, 5), torch.zeros(0, 5)).shape == (0,)
    worked = torch.tensor([3.0, 1.0]).log().requires_grad_()
    forward_kl(worked, torch.zeros(2)).backward()
    torch.testing.assert_close(worked.grad, torch.tensor([0.25, -0.25]))


def test_checkpointing_drops_the_gradient_and_makes_it_again():
    student, teacher = torch.randn(5, 9, requires_grad=True), torch.randn(5, 9)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda value: kept.append(value) or value, lambda value: value):
        forward_kl(student, teacher)
    assert [value.shape for value in kept] == [(5, 9)]
    checkpoint(forward_kl, student, teacher, use_reentrant=False).sum().backward()
    torch.testing.assert_close(student.grad, student.detach().softmax(-1) - teacher.softmax(-1))
