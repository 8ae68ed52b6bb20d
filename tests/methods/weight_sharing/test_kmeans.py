"""Weight sharing: exact tables, codes, masks; Huffman codes that lose nothing."""

import itertools

import pytest
import torch

import naive
from penjing.methods.weight_sharing.kmeans import KMeansOptions, kmeans, kmeans_compensated, needs
from penjing.numerics import huffman
from penjing.numerics import kmeans as numerics
from penjing.numerics.codebooks import CodebookGrid
from penjing.numerics.kmeans import exact_kmeans
from penjing.representations import Codebook, Masked
from penjing.runtime import huffman as fast
from penjing.statistics import ColumnNorm, Gram

FLOAT = torch.float32


def distortion(values, importance, centres):
    """Weighted squared distance to the nearest centre, by row."""
    nearest = (values.double().unsqueeze(-1) - centres.unsqueeze(1)).square().amin(-1)
    return (nearest * importance.double()).sum(1)


def brute(values, weights, count):
    """Of all ways to cut the sorted values into `count` runs, the least error."""
    order = values.argsort()
    values, weights = values[order].double(), weights[order].double()
    least = float("inf")
    for cuts in itertools.combinations(range(1, len(values)), count - 1):
        total = 0.0
        for start, stop in itertools.pairwise((0, *cuts, len(values))):
            run, share = values[start:stop], weights[start:stop]
            total += float((share * (run - (run * share).sum() / share.sum()).square()).sum())
        least = min(least, total)
    return least


@pytest.fixture(params=["kernel", "numpy"])
def solver(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(numerics, "helper", lambda source, package: None)


@pytest.mark.parametrize(("count", "size"), [(1, 6), (2, 7), (3, 9), (4, 10), (6, 6)])
def test_no_clustering_is_better(count, size, solver):
    generator = torch.Generator().manual_seed(count)
    values, weights = torch.randn(3, size, generator=generator), torch.rand(3, size, generator=generator) + 0.01
    found = distortion(values, weights, exact_kmeans(values, weights, count))
    for row in range(3):
        assert float(found[row]) == pytest.approx(brute(values[row], weights[row], count), rel=1e-9, abs=1e-12)


def test_never_worse_than_the_library():
    cluster = pytest.importorskip("sklearn.cluster")
    generator = torch.Generator().manual_seed(0)
    values, weights = torch.randn(4, 300, generator=generator), torch.rand(4, 300, generator=generator)
    values[1] = values[1] ** 3
    found = distortion(values, weights, exact_kmeans(values, weights, 16))
    for row in range(4):
        theirs = cluster.KMeans(16, n_init=4, random_state=row).fit(
            values[row].double().numpy()[:, None], sample_weight=weights[row].double().numpy()
        )
        assert float(found[row]) <= theirs.inertia_ * (1 + 1e-9)


def test_both_solvers_agree_on_ugly_rows(monkeypatch):
    generator = torch.Generator().manual_seed(1)
    values, weights = torch.randn(5, 61, generator=generator), torch.rand(5, 61, generator=generator)
    values[1], values[2] = values[1].round(), 3.0
    weights[3, :40], weights[4] = 0, 0
    kernel = exact_kmeans(values, weights, 7)
    monkeypatch.setattr(numerics, "helper", lambda source, package: None)
    torch.testing.assert_close(exact_kmeans(values, weights, 7), kernel, rtol=0, atol=1e-12)
    assert torch.isfinite(kernel).all() and (kernel.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("size", [None, "tensor", 7])
@pytest.mark.parametrize("masked", [False, True])
def test_codes_are_the_nearest_entries(size, masked):
    weight = naive.random_weight(6, 16)
    kept = weight.abs() > 0.02 if masked else None
    result = kmeans(weight, CodebookGrid(2, size, FLOAT), importance=torch.rand(16), kept=kept)
    values = result.values if isinstance(result, Masked) else result
    assert isinstance(values, Codebook) and isinstance(result, Masked) == masked
    groups = [slice(0, 16)] if size != 7 else [slice(0, 7), slice(7, 14), slice(14, 16)]
    for row, (group, span) in itertools.product(range(6), enumerate(groups)):
        table = values.tables[0 if size == "tensor" else row, group]
        for weight_, value in zip(weight[row, span], values.dense()[row, span], strict=True):
            assert abs(float(weight_ - value)) == pytest.approx(float((table - weight_).abs().min()), abs=1e-7)
    assert kept is None or (result.dense()[~kept] == 0).all()


def test_a_matrix_of_few_values_is_exact():
    weight = torch.tensor([0.5, -1.25, 3.0, 7.0])[torch.randint(4, (8, 12))]
    for size in (None, "tensor", 5):
        assert torch.equal(kmeans(weight, CodebookGrid(2, size, FLOAT)).dense(), weight)
    result = kmeans(weight, CodebookGrid(2, "tensor", FLOAT))
    assert torch.equal(result.rows(2, 5).dense(), weight[2:5]) and result.tables.shape == (1, 1, 4)


def test_compensation_helps_the_output():
    weight, inputs = naive.random_weight(24, 32), naive.correlated(300, 32)
    gram, grid = inputs.T @ inputs, CodebookGrid(3, None, FLOAT)
    importance = gram.diagonal()
    plain = naive.loss(weight, kmeans(weight, grid, importance=importance).dense(), gram)
    swept = kmeans_compensated(weight, gram, grid, importance=importance)
    assert naive.loss(weight, swept.dense(), gram) < 0.9 * plain
    gram[:, 3] = gram[3] = 0
    kept = weight.abs() > 0.01
    result = kmeans_compensated(weight, gram, CodebookGrid(2, 10, FLOAT), kept=kept)
    assert torch.isfinite(result.dense()).all() and (result.dense()[~kept] == 0).all()


def test_needs_follow_the_options():
    assert needs(KMeansOptions()) == (ColumnNorm,)
    assert needs(KMeansOptions(weighted=False)) == ()
    assert needs(KMeansOptions(compensate=True)) == (ColumnNorm, Gram)


@pytest.mark.parametrize("count", [0, 1, 2, 2047, 2048, 2049, 30_000])
@pytest.mark.parametrize("spread", [0.0, 2.0, 300.0])
def test_huffman_loses_nothing(count, spread):
    noise = torch.randn(count, generator=torch.Generator().manual_seed(count))
    symbols = (noise * spread + 128).clamp(0, 255).to(torch.uint8)
    coded = huffman.encode(symbols)
    assert torch.equal(huffman.decode(coded), symbols)
    assert torch.equal(fast.decode(coded), symbols)
    if count > 2048 and spread:
        share = torch.bincount(symbols.long()).double() / count
        entropy = float(-(share[share > 0] * share[share > 0].log2()).sum())
        assert entropy <= 8 * coded.stream.numel() / count <= entropy + 0.1


def test_code_lengths_are_the_best_and_at_most_12():
    lengths = huffman.code_lengths(torch.tensor([5, 0, 1, 2, 2]))
    assert lengths.tolist() == [1, 0, 3, 3, 2] or sorted(lengths.tolist()) == [0, 1, 2, 3, 3]
    assert int((lengths * torch.tensor([5, 0, 1, 2, 2])).sum()) == 18
    steep = huffman.code_lengths(2 ** torch.arange(40).clamp(max=30))
    assert int(steep.max()) == huffman.LONGEST
    assert float((2.0 ** -steep[steep > 0].double()).sum()) <= 1


@pytest.mark.parametrize("decode", [huffman.decode, fast.decode])
def test_damaged_streams_are_noticed(decode):
    symbols = torch.arange(200, dtype=torch.uint8).repeat(15)
    coded = huffman.encode(symbols)
    shorter = coded.lengths.clone()
    shorter[:190] = 0
    for damaged in (
        huffman.Huffman(coded.stream, coded.sizes, shorter, coded.count),
        huffman.Huffman(
            coded.stream[: coded.sizes[0] // 2], torch.tensor([int(coded.sizes[0]) // 2]), coded.lengths, 2000
        ),
    ):
        with pytest.raises(ValueError, match="no code"):
            decode(damaged)
