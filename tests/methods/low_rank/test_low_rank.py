"""Products of two thin matrices: identities, optimality in fp64, ugly statistics, how rank follows from recipe keys."""

import itertools

import numpy as np
import pytest
import torch

import naive
from penjing.methods.base import LinearInput
from penjing.methods.low_rank.asvd import asvd
from penjing.methods.low_rank.nmf import NMFOptions, nmf, semi_nmf
from penjing.methods.low_rank.nmf import linear as nmf_linear
from penjing.methods.low_rank.options import RankOptions
from penjing.methods.low_rank.pca import pca
from penjing.methods.low_rank.residual import ResidualOptions, correction, needs, residual
from penjing.methods.low_rank.svd import svd
from penjing.methods.low_rank.svd_llm import output_basis, svd_llm
from penjing.methods.quantization.rtn import rtn
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Scheme
from penjing.statistics import Gram

FLOAT = torch.float32


def problem(rows=14, columns=10, tokens=200):
    inputs = naive.correlated(tokens, columns)
    return naive.random_weight(rows, columns), inputs.T @ inputs


def loss(weight, result, gram):
    return naive.loss(weight, result.dense(), gram)


@pytest.mark.parametrize("rank", [1, 3, 10])
def test_svd_leaves_the_small_singular_values(rank):
    weight, _ = problem()
    values = np.linalg.svd(weight.double().numpy(), compute_uv=False)
    result = svd(weight, rank, FLOAT)
    assert result.rank == rank and result.shape == weight.shape
    error = float((weight.double() - result.dense()).square().sum())
    assert error == pytest.approx(float((values[rank:] ** 2).sum()), rel=1e-5, abs=1e-9)
    assert torch.allclose(result.left.values.norm(dim=0), result.right.values.norm(dim=1), rtol=1e-4)


@pytest.mark.parametrize("shape", [(14, 10), (10, 14)])
@pytest.mark.parametrize("rank", [1, 4, 9])
def test_svd_llm_is_the_whitened_svd(shape, rank):
    """The published algorithm: Cholesky factor of the Gram matrix, SVD, inverse."""
    weight, gram = problem(*shape)
    factor = torch.linalg.cholesky(gram.double())
    u, s, vt = torch.linalg.svd(weight.double() @ factor, full_matrices=False)
    expected = u[:, :rank] * s[:rank] @ vt[:rank] @ torch.linalg.inv(factor)
    result = svd_llm(weight, gram, rank, torch.float64)
    product = result.left.values @ result.right.values
    torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-7)
    assert naive.loss(weight, product, gram) == pytest.approx(float(s[rank:].square().sum()), rel=1e-5)


def test_no_other_product_has_closer_outputs():
    weight, gram = problem()
    best = loss(weight, svd_llm(weight, gram, 3, FLOAT), gram)
    generator = torch.Generator().manual_seed(3)
    for trial in range(20):
        left = torch.randn(14, 3, generator=generator, dtype=torch.float64)
        if trial % 2:  # near the optimum
            left = output_basis(weight, gram, 3) + 0.05 * left
        for _ in range(3):  # alternating least squares
            right = torch.linalg.pinv(left) @ weight.double()
            left = weight.double() @ gram.double() @ right.T @ torch.linalg.inv(right @ gram.double() @ right.T)
        assert naive.loss(weight, left @ right, gram) >= best * (1 - 1e-5)


@pytest.mark.parametrize("make", [svd_llm, pca])
@pytest.mark.parametrize("shape", [(14, 10), (6, 10)])
def test_full_rank_is_exact(make, shape):
    weight, gram = problem(*shape)
    gram[:, 4] = gram[4] = 0  # an input that was never active
    rank = min(shape) if make is svd_llm else shape[1]
    torch.testing.assert_close(make(weight, gram, rank, FLOAT).dense(), weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 5])
def test_few_tokens_are_no_trouble(tokens):
    weight, gram = problem(tokens=tokens)
    result = svd_llm(weight, gram, tokens, FLOAT)
    assert loss(weight, result, gram) <= 1e-5 * naive.loss(weight, torch.zeros_like(weight), gram)
    assert torch.isfinite(pca(weight, gram, 2, FLOAT).dense()).all()
    assert torch.isfinite(svd_llm(weight, torch.zeros_like(gram), 2, FLOAT).dense()).all()


def test_order_of_the_methods_on_correlated_inputs():
    """SVD-LLM is never worse than the others, whatever they are."""
    weight, gram = problem(24, 16)
    magnitude = gram.diagonal().sqrt()
    best = loss(weight, svd_llm(weight, gram, 5, FLOAT), gram)
    for other in (svd(weight, 5, FLOAT), asvd(weight, magnitude, 5, storage_dtype=FLOAT), pca(weight, gram, 5, FLOAT)):
        assert loss(weight, other, gram) >= best * (1 - 1e-6)


def test_asvd_is_svd_without_alpha_and_svd_llm_for_independent_inputs():
    weight, _ = problem()
    magnitude = torch.rand(10) + 0.1
    torch.testing.assert_close(
        asvd(weight, magnitude, 4, alpha=0, storage_dtype=FLOAT).dense(), svd(weight, 4, FLOAT).dense()
    )
    torch.testing.assert_close(
        asvd(weight, magnitude, 4, alpha=1, storage_dtype=FLOAT).dense(),
        svd_llm(weight, magnitude.square().diag(), 4, FLOAT).dense(),
        rtol=1e-3,
        atol=1e-5,
    )


def test_pca_gives_linears_with_one_input_one_right_factor():
    weight, gram = problem()
    first, second = pca(weight, gram, 4, FLOAT), pca(weight.flip(0) * 2, gram, 4, FLOAT)
    assert torch.equal(first.right.values, second.right.values)
    values = torch.linalg.eigvalsh(gram.double())
    identity = torch.eye(10)
    assert loss(identity, pca(identity, gram, 4, FLOAT), gram) == pytest.approx(float(values[:6].sum()), rel=1e-4)


def test_nmf_objectives_fall_and_signs_hold():
    generator = torch.Generator().manual_seed(5)
    positive, mixed = torch.rand(12, 9, generator=generator), torch.randn(12, 9, generator=generator)
    for method, weight, free in ((nmf, positive, False), (semi_nmf, mixed, True)):
        losses = []
        for rounds in (1, 2, 3, 5, 10, 40):
            left, right = method(weight, 4, rounds)
            assert (right >= 0).all() and (free or (left >= 0).all())
            losses.append(float((weight.double() - left @ right).square().sum()))
        assert all(after <= before + 1e-9 for before, after in itertools.pairwise(losses)), losses
        best = float((weight.double() - svd(weight, 4, FLOAT).dense()).square().sum())
        assert losses[-1] >= best - 1e-6


def test_nmf_is_as_good_as_the_library():
    decomposition = pytest.importorskip("sklearn.decomposition")
    weight = torch.rand(12, 9, generator=torch.Generator().manual_seed(5))
    theirs = decomposition.NMF(4, init="nndsvda", solver="mu", max_iter=400, tol=0).fit(weight.double().numpy())
    left, right = nmf(weight, 4, 400)
    assert float((weight - left @ right).norm()) <= theirs.reconstruction_err_ * 1.01


@pytest.mark.parametrize("form", ["split", "semi"])
def test_nmf_of_a_linear_spends_the_rank_it_was_given(form):
    weight, _ = problem()
    for rank in (5, 12):
        result = nmf_linear(LinearInput(weight, {}, None, FLOAT), NMFOptions(rank=rank, form=form, rounds=5))
        assert result.rank == rank and torch.isfinite(result.dense()).all()


def test_correction_of_the_error_in_the_metric_of_the_output():
    weight, gram = problem(24, 16)
    grid = IntegerGrid(3, None, scale_dtype=FLOAT)
    plain = rtn(weight, grid)
    error = weight - plain.dense()
    values = torch.linalg.eigvalsh(error.double() @ gram.double() @ error.double().T)
    found = residual(weight, lambda w: rtn(w, grid), gram, 4, storage_dtype=FLOAT)
    assert loss(weight, found, gram) == pytest.approx(float(values[:-4].sum()), rel=1e-3)
    in_weights = residual(weight, lambda w: rtn(w, grid), None, 4, storage_dtype=FLOAT)
    assert loss(weight, plain, gram) > loss(weight, in_weights, gram) > loss(weight, found, gram)
    more = residual(weight, lambda w: rtn(w, grid), gram, 4, rounds=4, storage_dtype=FLOAT)
    assert loss(weight, more, gram) <= loss(weight, found, gram)


def test_rounded_factors_lose_little():
    weight, gram = problem(24, 16)
    exact = correction(weight, gram, 4, None, FLOAT)
    rounded = correction(weight, gram, 4, IntegerGrid(8, None, scale_dtype=FLOAT), FLOAT)
    total = naive.loss(weight, torch.zeros_like(weight), gram)
    assert loss(weight, exact, gram) <= loss(weight, rounded, gram) <= loss(weight, exact, gram) + 1e-3 * total
    nothing = correction(torch.zeros(6, 5), None, 2, IntegerGrid(8, None, scale_dtype=FLOAT), FLOAT)
    assert (nothing.dense() == 0).all()


def test_ranks_follow_from_ratios():
    options = RankOptions(ratio=0.5)
    assert options.rank_of((100, 300)) == 32  # 37.5, a multiple of 8
    assert RankOptions(ratio=0.5, multiple=1).rank_of((100, 300)) == 37
    assert RankOptions(ratio=0.01).rank_of((10, 10)) == 1
    assert options.for_matrix((100, 300), FLOAT).rank == 32
    assert options.declines((100, 300)) == ""
    for keys in ({}, {"rank": 4, "ratio": 0.5}):
        with pytest.raises(ValueError, match="either `rank` or `ratio`"):
            RankOptions(**keys)


def test_factors_that_would_be_larger_are_declined():
    assert RankOptions(rank=49).declines((100, 100)) == ""
    assert "below rank 50" in RankOptions(rank=50).declines((100, 100))
    assert "as large as the matrix" in ResidualOptions(rank=10).declines((10, 30))


def test_low_rank_comes_first():
    with pytest.raises(ValueError, match="before pruning and quantisation"):
        RankOptions(rank=2).scheme(Scheme(sparsity=0.5), FLOAT)


def test_the_residual_method_needs_text_only_for_outputs():
    assert needs(ResidualOptions()) == (Gram,)
    assert needs(ResidualOptions(base="rtn", objective="weights")) == ()
    with pytest.raises(ValueError, match="gptq looks at the inputs"):
        ResidualOptions(objective="weights")
