"""Binary coding against fp64 loops: greedy, least squares, nearest codes, alternation; degenerate groups."""

import itertools

import pytest
import torch

from penjing.numerics.binary_coding import (
    BinaryGrid,
    Levels,
    Nearest,
    alternating,
    decode,
    greedy,
    least_squares,
    signs,
    uniform,
    weighted_error,
)

GENERATOR = torch.Generator().manual_seed(0)


def groups(rows=6, width=40):
    return torch.randn(rows, width, generator=GENERATOR)


def every_sum(alpha, offset):
    """All 2**q levels, by brute force, fp64."""
    return [
        sum(sign * float(scale) for sign, scale in zip(combination, alpha, strict=True)) + float(offset)
        for combination in itertools.product((-1, 1), repeat=len(alpha))
    ]


def test_worked_example():
    weight = torch.tensor([[1.0, 2, -2, 7]])
    assert greedy(weight, 1).alpha.tolist() == [[3.0]]
    start = greedy(weight, 2)
    assert start.alpha.tolist() == [[3.0, 2.0]]
    codes, values = Nearest(start)(weight)
    assert values.tolist() == [[1.0, 1.0, -1.0, 5.0]]
    fitted = least_squares(weight, codes, torch.ones(1, 4), bits=2)
    torch.testing.assert_close(fitted.alpha, torch.tensor([[13 / 3, 8 / 3]]), atol=1e-4, rtol=0)
    assert float(weighted_error(weight, fitted)) * 4 == pytest.approx(2 / 3, rel=1e-4)


def test_codes_hold_the_signs():
    assert signs(torch.tensor([5], dtype=torch.uint8), 3).tolist() == [[1.0, -1.0, 1.0]]
    levels = Levels(torch.tensor([[4.0, 2.0, 1.0]]), torch.tensor([0.5]))
    assert decode(torch.tensor([[5, 0, 7]], dtype=torch.uint8), levels).tolist() == [[3.5, -6.5, 7.5]]


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("offset", [False, True])
def test_nearest_is_the_nearest_of_all_sums(bits, offset):
    weight = groups()
    levels = greedy(weight, bits, offset=offset)
    codes, values = Nearest(levels)(weight)
    torch.testing.assert_close(decode(codes, levels), values)
    for row in range(len(weight)):
        points = every_sum(levels.alpha[row], levels.offset[row])
        for column in range(weight.shape[1]):
            best = min(abs(point - float(weight[row, column])) for point in points)
            assert abs(float(values[row, column] - weight[row, column])) == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize("offset", [False, True])
@pytest.mark.parametrize("metric", ["importance", "matrix"])
def test_least_squares_against_lstsq(bits, offset, metric):
    weight = groups()
    width = weight.shape[1]
    codes = torch.randint(0, 2**bits, weight.shape, generator=GENERATOR).to(torch.uint8)
    if metric == "importance":
        given = torch.rand(weight.shape, generator=GENERATOR) + 0.1
        roots = [torch.diag(row.double().sqrt()) for row in given]
    else:
        root = torch.randn(width, width, generator=GENERATOR).double() / width**0.5
        given, roots = (root.T @ root).float().unsqueeze(0), [root] * len(weight)
    fitted = least_squares(weight, codes, given, bits=bits, offset=offset)
    for row, root in enumerate(roots):
        planes = torch.stack([((codes[row] >> i) & 1).double() * 2 - 1 for i in range(bits)], -1)
        if offset:
            planes = torch.cat([planes, torch.ones(width, 1, dtype=torch.float64)], 1)
        best = torch.linalg.lstsq(root @ planes, root @ weight[row].double()).solution
        expected = best[:bits].abs().sort(descending=True).values
        torch.testing.assert_close(fitted.alpha[row].double(), expected, atol=1e-3, rtol=1e-3)
        if offset:
            assert float(fitted.offset[row]) == pytest.approx(float(best[bits]), abs=1e-3)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_alternation_never_gets_worse_and_reaches_known_distortion(bits):
    weight = torch.randn(256, 128, generator=GENERATOR)
    levels, errors = greedy(weight, bits), []
    for _ in range(15):
        errors.append(weighted_error(weight, levels))
        levels = alternating(weight, levels, 1)
    errors.append(weighted_error(weight, levels))
    assert all(bool((after <= before * (1 + 1e-4)).all()) for before, after in itertools.pairwise(errors))
    published = {2: (0.128, 0.1145), 3: (0.0569, 0.0350), 4: (0.0315, 0.0109)}[bits]
    assert float(errors[0].mean()) == pytest.approx(published[0], rel=0.06)
    assert float(errors[-1].mean()) == pytest.approx(published[1], rel=0.08)


def test_the_fit_scales_with_the_weights():
    weight = groups()
    whole, tiny = (alternating(part, greedy(part, 3), 10) for part in (weight, weight * 2.0**-20))
    torch.testing.assert_close(tiny.alpha * 2.0**20, whole.alpha)


def test_importance_is_what_is_minimised():
    weight, importance = groups(rows=32, width=64), torch.logspace(-3, 3, 64)
    alike, weighted = (alternating(weight, greedy(weight, 2, by), 10, by) for by in (None, importance))
    errors = [weighted_error(weight, levels, importance).mean() for levels in (weighted, alike)]
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.parametrize("offset", [False, True])
def test_degenerate_groups(offset):
    weight = torch.tensor([[0.0] * 8, [0.25] * 8, [0, 0, 0, 0, 0, 0, 0, 1.0]])
    levels = alternating(weight, greedy(weight, 3, offset=offset), 5, offset=offset)
    values = Nearest(levels)(weight)[1]
    assert torch.isfinite(values).all()
    assert values[0].tolist() == [0.0] * 8
    torch.testing.assert_close(values[1], weight[1], atol=1e-5, rtol=0)
    nothing_counts = greedy(weight, 2, torch.zeros(8), offset=offset)
    assert torch.isfinite(nothing_counts.alpha).all()


def test_uniform_levels_are_evenly_spaced():
    weight = torch.tensor([[-1.0, 0.5, 6.0]])
    spread = sorted(every_sum(*(part[0] for part in (uniform(weight, 3).alpha, uniform(weight, 3).offset))))
    assert spread == pytest.approx([-6 + 12 / 7 * i for i in range(8)])
    asymmetric = uniform(weight, 3, offset=True)
    assert sorted(every_sum(asymmetric.alpha[0], asymmetric.offset[0])) == pytest.approx([i - 1.0 for i in range(8)])


def test_label_names_group_and_offset():
    assert BinaryGrid(3, 64).label == "g64 binary-coded"
    assert BinaryGrid(3, None, offset_dtype=torch.float32).label == "per channel binary-coded offset"
