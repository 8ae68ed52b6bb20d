"""Static ranges against searches written as loops in fp64, and a histogram that loses nothing while it widens."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from penjing.numerics.activations import Activations
from penjing.numerics.histogram import Histogram
from penjing.numerics.observers import entropy_bounds, mse_bounds, percentile_bounds, static_scale

STATIC = Activations(dynamic=False, granularity="tensor")
ASYMMETRIC = Activations(dynamic=False, granularity="tensor", symmetric=False)


def inputs(seed: int = 0, tokens: int = 200) -> Tensor:
    """Skewed, with a few outliers."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, 16, generator=generator) * 0.7 + 0.3
    x[::50, 3] *= 12
    return x


def seen(x: Tensor, bins: int = 256) -> Histogram:
    histogram = Histogram(x.shape[1], bins=bins)
    histogram.update(x)
    return histogram


def test_widening_loses_no_count_and_order_does_not_matter():
    x = inputs() * torch.logspace(-6, 4, 200)[:, None]
    whole = seen(x)
    for order in (torch.arange(200), torch.arange(200).flip(0), torch.randperm(200)):
        parts = Histogram(16, bins=256)
        for chunk in x[order].split(7):
            parts.update(chunk)
        assert torch.equal(parts.counts, whole.counts)
        assert (parts.reach, parts.smallest, parts.largest) == (whole.reach, whole.smallest, whole.largest)
    assert int(whole.counts.sum()) == x.numel()
    assert parts.tokens == 200


def test_every_value_lies_in_its_bin():
    x = inputs()
    histogram = seen(x)
    width = 2 * histogram.reach / 256
    expected = torch.zeros(256, dtype=torch.int64)
    for value in x.double().flatten().tolist():
        expected[math.floor(value / width) + 128] += 1
    assert torch.equal(histogram.counts, expected)
    assert histogram.reach / 2 <= x.abs().max() < histogram.reach
    magnitudes = torch.zeros(128, dtype=torch.int64)
    for centre, count in zip(histogram.centres.tolist(), expected.tolist(), strict=True):
        magnitudes[math.floor(abs(centre) / width)] += count
    assert torch.equal(histogram.magnitudes, magnitudes)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_told_and_stays_told(bad):
    histogram = Histogram(4)
    histogram.update(torch.tensor([[1.0, 2.0, bad, 0.0]]))
    histogram.update(torch.ones(1, 4))
    assert math.isnan(histogram.largest)


def test_zeros_only_and_nothing_at_all():
    histogram = seen(torch.zeros(3, 4))
    for observer in ("minmax", "percentile", "entropy", "mse"):
        by = static_scale(histogram, STATIC, observer)
        assert by.scale > 0 and torch.isfinite(by.scale)
    histogram.update(torch.zeros(0, 4))
    assert int(histogram.counts.sum()) == 12


def test_minmax_is_the_range():
    x = inputs()
    assert static_scale(seen(x), STATIC, "minmax").scale == pytest.approx(float(x.abs().max()) / 127.5)
    scale, zero = static_scale(seen(x), ASYMMETRIC, "minmax")
    assert scale == pytest.approx(float(x.max() - x.min()) / 255)
    assert zero.dtype == torch.int8 and float(zero) == pytest.approx(-128 - float(x.min() / scale), abs=0.51)


@pytest.mark.parametrize("percent", [60.0, 90.0, 99.0, 99.9, 100.0])
def test_percentile_leaves_out_as_many_values_as_it_says(percent):
    x = inputs().double()
    histogram = seen(x.float(), 4096)
    width = 2 * histogram.reach / 4096
    low, high = percentile_bounds(histogram, True, percent)
    edge = max(-low, high)
    ordered = x.abs().flatten().sort().values
    expected = float(ordered[min(math.ceil(percent / 100 * len(ordered)), len(ordered)) - 1])
    assert expected - 1e-6 <= edge <= expected + width
    low, high = percentile_bounds(histogram, False, percent)
    beyond = (1 - percent / 100) * x.numel()
    assert int((x < low).sum()) <= beyond / 2 + 1e-6 and int((x > high).sum()) <= beyond / 2 + 1e-6
    assert int((x < low + width).sum()) + 1e-6 >= beyond / 2 or low == histogram.smallest
    assert int((x > high - width).sum()) + 1e-6 >= beyond / 2 or high == histogram.largest


def naive_divergence(counts: list[float], cut: int, levels: int) -> float:
    wanted = counts[:cut]
    wanted[-1] += sum(counts[cut:])
    rounded = [0.0] * cut
    for level in range(levels):
        members = [i for i in range(cut) if i * levels // cut == level]
        filled = [i for i in members if counts[i] > 0]
        for i in filled:
            rounded[i] = sum(counts[j] for j in members) / len(filled)
    total, mass = sum(wanted), sum(rounded)
    divergence = 0.0
    for p, q in zip(wanted, rounded, strict=True):
        if p > 0 and (q == 0 or mass == 0):
            return math.inf
        if p > 0:
            divergence += p / total * math.log(p / total / (q / mass))
    return divergence


@pytest.mark.parametrize("seed", range(3))
def test_entropy_equals_the_search_written_as_loops(seed):
    histogram = seen(inputs(seed), 256)
    counts = [float(count) for count in histogram.magnitudes]
    best = min(range(8, 129), key=lambda cut: naive_divergence(counts, cut, 8))
    low, high = entropy_bounds(histogram, 8)
    seen_most = max(-histogram.smallest, histogram.largest)
    assert max(-low, high) == pytest.approx(min(best * histogram.reach / 128, seen_most))


def test_entropy_clips_an_outlier_and_keeps_a_flat_range():
    outlier = torch.randn(2000, 16, generator=torch.Generator().manual_seed(1))
    outlier[0, 0] = 60.0
    low, high = entropy_bounds(seen(outlier, 8192), 128)
    assert 3 < high < 10 and -10 < low < -3
    flat = torch.rand(2000, 16, generator=torch.Generator().manual_seed(2)) * 2 - 1
    assert entropy_bounds(seen(flat, 8192), 128)[1] > 0.95


@pytest.mark.parametrize("how", [STATIC, ASYMMETRIC, Activations(4, "int", False, "tensor")])
def test_mse_equals_the_search_written_as_loops(how):
    histogram = seen(inputs(), 512)
    width = 2 * histogram.reach / 512
    least, best = math.inf, 0
    for shrink in range(100, 0, -1):
        low, high = histogram.smallest * shrink / 100, histogram.largest * shrink / 100
        if how.symmetric:
            scale, zero = max(-low, high) / ((how.high - how.low) / 2), 0
        else:
            scale = (max(high, 0) - min(low, 0)) / (how.high - how.low)
            zero = round(how.low - min(low, 0) / scale)
        error = 0.0
        for position, count in enumerate(histogram.counts.tolist()):
            value = (position - 256 + 0.5) * width
            code = round(min(max(value / scale + zero, how.low), how.high))
            error += count * ((code - zero) * scale - value) ** 2
        if error < least * (1 - 1e-12):
            least, best = error, shrink
    low, high = mse_bounds(histogram, how)
    assert (low, high) == pytest.approx((histogram.smallest * best / 100, histogram.largest * best / 100))


def test_fp8_needs_no_clipping():
    """The steps of a float shrink with the value: clipping only loses."""
    how = Activations(8, "float", False, "tensor")
    scale = static_scale(seen(inputs(), 8192), how, "minmax").scale
    assert scale == pytest.approx(float(inputs().abs().max()) / 448)
    assert static_scale(seen(inputs(), 8192), how, "mse").scale > 0.7 * scale
