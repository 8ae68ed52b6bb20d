"""Metrics against fp64 written the long way."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from penjing.errors import CalibrationError
from penjing.evaluation import metrics
from penjing.evaluation.metrics import Comparison


def _logits(seed: int, tokens: int = 37, vocabulary: int = 101, spread: float = 4.0):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(tokens, vocabulary, generator=generator) * spread
    compressed = dense + torch.randn(tokens, vocabulary, generator=generator)
    return dense, compressed, torch.randint(vocabulary, (tokens,), generator=generator)


def _naive(dense, compressed, targets):
    """Every quantity in fp64, one token at a time, from the definitions."""
    nll, dense_nll, kl, agreed = [], [], [], 0
    for p, q, target in zip(dense.double(), compressed.double(), targets.tolist(), strict=True):
        p, q = p.exp() / p.exp().sum(), q.exp() / q.exp().sum()
        nll.append(-math.log(q[target]))
        dense_nll.append(-math.log(p[target]))
        kl.append(sum(a * (math.log(a) - math.log(b)) for a, b in zip(p.tolist(), q.tolist(), strict=True)))
        agreed += int(p.argmax() == q.argmax())
    count = len(kl)
    mean = sum(kl) / count
    error = math.sqrt(sum((each - mean) ** 2 for each in kl) / (count - 1) / count)
    return math.exp(sum(nll) / count), math.exp(sum(dense_nll) / count), mean, error, agreed / count


@pytest.mark.parametrize("elements", [2**23, 101 * 5, 1])
def test_equals_naive_fp64_whatever_the_chunks(elements, monkeypatch):
    monkeypatch.setattr(metrics, "_ELEMENTS", elements)
    dense, compressed, targets = _logits(0)
    comparison = Comparison()
    for start, stop in ((0, 20), (20, 21), (21, 37)):
        comparison.update(compressed[start:stop], targets[start:stop], dense[start:stop])
    found = comparison.result()
    perplexity, dense_perplexity, kl, error, agreement = _naive(dense, compressed, targets)
    assert found.tokens == 37
    assert found.perplexity == pytest.approx(perplexity, rel=1e-6)
    assert found.reference_perplexity == pytest.approx(dense_perplexity, rel=1e-6)
    assert found.kl == pytest.approx(kl, rel=1e-6)
    assert found.kl_error == pytest.approx(error, rel=1e-5)
    assert found.top1 == agreement


def test_equal_logits_give_exactly_zero_and_all():
    dense, _, targets = _logits(1)
    comparison = Comparison()
    comparison.update(dense, targets, dense.clone())
    found = comparison.result()
    assert found.kl == 0.0 and found.kl_error == 0.0 and found.top1 == 1.0
    assert found.perplexity == found.reference_perplexity


def test_tiny_divergence_is_not_lost_in_rounding():
    dense, _, targets = _logits(2, tokens=64, vocabulary=5000)
    noise = torch.randn(dense.shape, generator=torch.Generator().manual_seed(3)) * 1e-3
    comparison = Comparison()
    comparison.update(dense + noise, targets, dense)
    p, q = torch.log_softmax(dense.double(), 1), torch.log_softmax((dense + noise).double(), 1)
    expected = float((p.exp() * (p - q)).sum(1).mean())
    assert expected < 1e-6
    assert comparison.result().kl == pytest.approx(expected, rel=0.02)


def test_adding_a_constant_to_the_logits_changes_nothing():
    dense, _, targets = _logits(4)
    comparison = Comparison()
    comparison.update(dense + 8.0, targets, dense)
    assert 0 <= comparison.result().kl < 1e-7


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(1e-3, 60.0), st.sampled_from([torch.float32, torch.bfloat16]))
def test_divergence_is_never_negative(seed, spread, dtype):
    dense, compressed, targets = _logits(seed, tokens=5, vocabulary=33, spread=spread)
    comparison = Comparison()
    comparison.update(compressed.to(dtype), targets, dense.to(dtype))
    found = comparison.result()
    assert found.kl >= 0 and math.isfinite(found.kl) and math.isfinite(found.kl_error)


def test_uniform_logits_have_the_vocabulary_as_perplexity():
    comparison = Comparison()
    comparison.update(torch.zeros(10, 64), torch.arange(10))
    found = comparison.result()
    assert found.perplexity == pytest.approx(64, rel=1e-6)
    assert found.kl is None and found.top1 is None and found.reference_perplexity is None


def test_inputs_are_not_changed():
    dense, compressed, targets = _logits(5)
    before = dense.clone(), compressed.clone()
    Comparison().update(compressed, targets, dense)
    assert torch.equal(dense, before[0]) and torch.equal(compressed, before[1])


def test_hopeless_logits_give_infinity_and_no_overflow():
    logits = torch.zeros(2, 4)
    logits[:, 0] = 5000.0
    comparison = Comparison()
    comparison.update(logits, torch.tensor([1, 2]))
    assert comparison.result().perplexity == math.inf


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["the model's", "the dense model's"])
def test_logits_that_are_not_finite_are_an_error(bad, side):
    dense, compressed, targets = _logits(6)
    (dense if "dense" in side else compressed)[3, 7] = bad
    with pytest.raises(CalibrationError, match=f"{side} logits hold NaN or infinity"):
        Comparison().update(compressed, targets, dense)


def test_misuse_is_refused():
    dense, compressed, targets = _logits(7)
    with pytest.raises(ValueError, match=r"\(T, V\) and \(T,\)"):
        Comparison().update(compressed, targets[:-1])
    with pytest.raises(ValueError, match="must be alike"):
        Comparison().update(compressed, targets, dense[:, :-1])
    comparison = Comparison()
    comparison.update(compressed, targets, dense)
    with pytest.raises(ValueError, match="every update"):
        comparison.update(compressed, targets)
    with pytest.raises(CalibrationError, match="no token was scored"):
        Comparison().result()
