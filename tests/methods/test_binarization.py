"""Binarisation: least-squares optima against brute force and SVD, orderings, gradients, ugly input."""

import itertools
import warnings

import pytest
import torch

import naive
from penjing.methods import METHODS
from penjing.methods.base import LinearInput
from penjing.methods.binarization.billm import BiLLMOptions, billm
from penjing.methods.binarization.onebit import onebit, value_vectors
from penjing.methods.binarization.ternary import ternary
from penjing.methods.learning import straight_through
from penjing.numerics.binary_coding import BinaryGrid
from penjing.numerics.ternary import TernaryGrid
from penjing.representations import BinaryCoded, Masked, Quantized, Scheme

CASES = [
    ("xnor", {}),
    ("xnor", {"order": 2, "group_size": 20, "weighted": True}),
    ("onebit", {}),
    ("onebit", {"weighted": False}),
    ("billm", {"block_size": 32}),
    ("billm", {}),
    ("ternary", {"group_size": 20}),
    ("ternary", {"objective": "inputs", "group_size": "channel"}),
    ("ternary", {"objective": "weights", "rule": "absmean", "group_size": "tensor"}),
]


def given(name, keys, weight, inputs, kept=None, dtype=torch.bfloat16):
    method = METHODS[name]
    options = method.options(**keys)
    statistics = {kind: kind(weight.shape[1]) for kind in method.needs(options)}
    for statistic in statistics.values():
        statistic.update(inputs)
    return LinearInput(weight, statistics, kept, dtype, (("a", len(weight)),)), options


def run(name, keys, weight, inputs, kept=None, dtype=torch.bfloat16):
    return METHODS[name].linear(*given(name, keys, weight, inputs, kept, dtype))


def output_error(weight, result, inputs):
    return float(((weight - result.dense()) @ inputs.T).norm() / (weight @ inputs.T).norm())


@pytest.mark.parametrize(("name", "keys"), CASES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_result_is_what_the_scheme_promised(name, keys, masked):
    weight, inputs = naive.random_weight(12, 100), naive.correlated(256, 100)
    kept = weight.abs() > 0.02 if masked else None
    before = Scheme(sparsity=0.3) if masked else Scheme()
    result = run(name, keys, weight, inputs, kept)
    scheme = METHODS[name].options(**keys).scheme(before, torch.bfloat16)
    values = result.values if isinstance(result, Masked) else result
    assert isinstance(result, Masked) == (scheme.sparsity > 0)
    assert isinstance(values, BinaryCoded | Quantized) and values.grid == scheme.grid
    assert (values.group_index is not None) == scheme.ordered
    assert torch.isfinite(result.dense()).all()
    if kept is not None:
        assert not result.dense()[~kept].any()
    assert torch.equal(result.rows(3, 7).dense(), result.dense()[3:7])


@pytest.mark.parametrize("name", ["xnor", "onebit", "billm", "ternary"])
def test_ugly_input(name):
    weight, inputs = naive.random_weight(6, 70), naive.correlated(1, 70)
    inputs[:, 5:9] = 0
    weight[2] = 0
    weight[3] = 0.25
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = run(name, {}, weight, inputs).dense()
    assert torch.isfinite(result).all()
    assert torch.equal(weight[2], torch.zeros(70)), "the weight belongs to the caller"


def test_xnor_is_the_best_sign_vector_and_scale():
    weight = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    result = run("xnor", {}, weight, torch.zeros(1, 6), dtype=torch.float32).dense()
    for row, found in zip(weight.double(), result.double(), strict=True):
        best = min(
            float((row - (row @ b) / 6 * b).square().sum())
            for b in (torch.tensor(signs).double() for signs in itertools.product((-1.0, 1.0), repeat=6))
        )
        assert float((row - found).square().sum()) == pytest.approx(best, rel=1e-5)


def test_residuals_shrink():
    weight = naive.random_weight(16, 128)
    errors = [
        float((weight - run("xnor", {"order": order}, weight, torch.zeros(1, 128)).dense()).norm())
        for order in (1, 2, 3, 4)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] ** 2 / float(weight.square().sum()) == pytest.approx(1 - 2 / torch.pi, abs=0.02)  # a Gaussian


def test_value_vectors_are_the_first_singular_vectors():
    magnitude = naive.random_weight(20, 30).abs()
    outputs, inputs = value_vectors(magnitude, rounds=50)
    u, s, v = torch.linalg.svd(magnitude.double())
    torch.testing.assert_close(outputs.outer(inputs).double(), s[0] * u[:, :1] @ v[:1], atol=1e-6, rtol=1e-4)
    weights = torch.rand(30) + 0.1
    outputs, inputs = value_vectors(magnitude, weights, rounds=80)
    u, s, v = torch.linalg.svd(magnitude.double() * weights.sqrt())
    expected = s[0] * u[:, :1] @ v[:1] / weights.sqrt()
    torch.testing.assert_close(outputs.outer(inputs).double(), expected, atol=1e-5, rtol=1e-3)


def test_onebit_is_exact_on_magnitudes_of_rank_one():
    weight = torch.tensor([[1.0, -2.0], [-2.0, 4.0]])
    torch.testing.assert_close(onebit(weight, storage_dtype=torch.float32).dense(), weight)


def test_looking_at_the_output_pays():
    weight, inputs = naive.random_weight(48, 256), naive.correlated(1024, 256)
    error = {
        str(case): output_error(weight, run(*case, weight, inputs), inputs)
        for case in [
            ("xnor", {}),
            ("onebit", {}),
            ("onebit", {"weighted": False}),
            ("billm", {}),
            ("xnor", {"order": 2}),
            ("ternary", {"objective": "weights", "rule": "absmean"}),
            ("ternary", {"objective": "weights"}),
            ("ternary", {"objective": "inputs"}),
            ("ternary", {}),
        ]
    }
    signs, value, plain, salient, second, absmean, squares, weighted, swept = error.values()
    assert value < plain < signs * 1.01
    assert salient < 0.8 * second
    assert swept < 0.9 * weighted < weighted < squares < absmean


def test_billm_stores_two_planes_and_salient_columns_apart():
    weight, inputs = naive.random_weight(32, 256), naive.correlated(1024, 256)
    weight[:, 1] *= 8  # with a large input as well
    result = run("billm", {}, weight, inputs)
    groups = result.group_index
    assert set((groups // 2).tolist()) == {0, 1} and result.alpha.shape == (32, 4, 2)
    assert groups[1] == 1, "the loudest column is salient"
    assert 8 * result.nbytes() / weight.numel() == pytest.approx(2 + 4 * 16 / 128 + 32 / 32, abs=0.01)


def test_billm_blocks_of_any_width():
    weight, inputs = naive.random_weight(8, 100), naive.correlated(512, 100)
    gram = inputs.T @ inputs
    for block in (16, 32, 64, 128):
        grid = BiLLMOptions(block_size=block).grid(torch.bfloat16)
        assert output_error(weight, billm(weight, gram, grid), inputs) < 0.6


def test_split_of_the_worked_example():
    weight = torch.tensor([[0.1, -0.2, 0.3, 2.0]])
    result = billm(weight, torch.eye(4), BinaryGrid(2, 64, torch.float32), damping=0)
    torch.testing.assert_close(result.dense(), torch.tensor([[0.2, -0.2, 0.2, 2.0]]))


def test_training_through_three_values():
    """Straight-through training moves the latent weights until a target is met better than by rounding it."""
    inputs, target = naive.correlated(64, 24), naive.random_weight(4, 24)
    grid = TernaryGrid(group_size=8, scale_dtype=torch.float32)

    def loss(weight):
        return ((weight - target) @ inputs.T).square().mean()

    latent = target.clone().requires_grad_()
    start = float(loss(ternary(target, grid).dense()))
    optimizer = torch.optim.Adam([latent], lr=2e-3)
    best = start
    for _ in range(60):
        optimizer.zero_grad()
        value = loss(straight_through(latent, lambda weight: ternary(weight, grid)))
        best = min(best, float(value.detach()))
        value.backward()
        optimizer.step()
    assert best < 0.95 * start
    gradient = torch.autograd.grad(straight_through(latent, lambda weight: ternary(weight, grid)).sum(), latent)[0]
    assert torch.equal(gradient, torch.ones(4, 24))


def test_a_plan_says_what_will_happen():
    for name in ("xnor", "onebit", "billm", "ternary"):
        caution = METHODS[name].caution
        assert "135 M" in caution(None, 135_000_000) and "start of such training" in caution(None, 7_000_000_000)
