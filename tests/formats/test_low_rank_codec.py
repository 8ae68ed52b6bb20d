"""Products, corrections, codebooks and tensor trains on disk; and the linears they load as."""

import pytest
import torch

import naive
from penjing.errors import FormatError
from penjing.formats.native.codecs.base import stream_bytes
from penjing.formats.native.codecs.codebook import huffman_names
from penjing.formats.native.layout import from_parts, parts_bytes, to_parts
from penjing.methods.base import LinearInput
from penjing.methods.low_rank.residual import residual
from penjing.methods.low_rank.svd import svd
from penjing.methods.low_rank.tensor_train import tensor_train
from penjing.methods.quantization.gptq import gptq
from penjing.methods.quantization.rtn import rtn
from penjing.methods.weight_sharing.kmeans import kmeans
from penjing.numerics.codebooks import CodebookGrid
from penjing.numerics.grids import IntegerGrid
from penjing.numerics.tensor_trains import Train
from penjing.pipeline import factors
from penjing.representations import Codebook, Dense, LowRank, Masked, Scheme
from penjing.runtime import runner_for
from penjing.statistics import Gram

FLOAT = torch.float32
WEIGHT = naive.random_weight(12, 20)
GRID, EIGHT = IntegerGrid(4, 8, scale_dtype=FLOAT), IntegerGrid(8, None, scale_dtype=FLOAT)
TRAIN = Train.of_rank((4, 5), 2)


def coded_factors():
    plain = svd(WEIGHT, 3, FLOAT)
    return LowRank(rtn(plain.left.dense(), GRID), rtn(plain.right.dense(), GRID))


def corrected(factor_grid):
    return residual(WEIGHT, lambda weight: rtn(weight, GRID), None, 2, factor_grid=factor_grid, storage_dtype=FLOAT)


CASES = {
    "dense factors": (svd(WEIGHT, 3, FLOAT), Scheme(rank=3)),
    "coded factors": (coded_factors(), Scheme(GRID, rank=3)),
    "correction": (corrected(None), Scheme(GRID, correction=2)),
    "coded correction": (corrected(EIGHT), Scheme(GRID, correction=2, correction_grid=EIGHT)),
    "tensor train": (tensor_train(WEIGHT, TRAIN, FLOAT), Scheme(train=TRAIN)),
    "codebook": (kmeans(WEIGHT, CodebookGrid(3, 8, FLOAT)), Scheme(CodebookGrid(3, 8, FLOAT))),
    "one codebook": (kmeans(WEIGHT, CodebookGrid(3, "tensor", FLOAT)), Scheme(CodebookGrid(3, "tensor", FLOAT))),
}


@pytest.mark.parametrize("name", CASES)
def test_what_is_stored_comes_back_and_weighs_what_was_said(name):
    weight, scheme = CASES[name]
    parts = to_parts(weight, scheme)
    back, read = from_parts(parts, "module")
    assert read == scheme and torch.equal(back.dense(), weight.dense())
    assert sum(part.nbytes for part in parts.values()) == parts_bytes((12, 20), scheme, 240, 4)
    header = parts["header"].nbytes
    assert weight.nbytes() == sum(part.nbytes for part in parts.values()) - header
    for part in parts:
        with pytest.raises(FormatError, match=r"module.*missing|is missing"):
            from_parts({key: value for key, value in parts.items() if key != part}, "module")
    assert torch.equal(weight.rows(2, 9).dense(), weight.dense()[2:9])


@pytest.mark.parametrize("kept", [None, WEIGHT.abs() > 0.05])
def test_huffman_codes_and_masks(kept):
    scheme = Scheme(CodebookGrid(3, "tensor", FLOAT, huffman=True), 0.0 if kept is None else 0.7)
    weight = kmeans(WEIGHT, scheme.grid, kept=kept)
    parts = to_parts(weight, scheme)
    back, read = from_parts(parts, "module")
    assert read == scheme and torch.equal(back.dense(), weight.dense())
    assert isinstance(back, Codebook if kept is None else Masked)
    survivors = 240 if kept is None else int(kept.sum())
    coded = sum(parts[name].nbytes for name in huffman_names("codes"))
    assert coded <= stream_bytes(survivors, 3) + 3 + 256  # as codes of one length, and a block
    if kept is not None:
        assert sum(parts[name].nbytes for name in huffman_names("mask")) <= 240 // 8 + 3 + 256
    damaged = parts | {"codes_lengths": torch.zeros_like(parts["codes_lengths"])}
    with pytest.raises(FormatError, match=r"weight_codes_stream: .*damaged"):
        from_parts(damaged, "module")


@pytest.mark.parametrize(("bits", "within"), [(3, 0.06), (5, 0.02)])
@pytest.mark.parametrize("kept", [1.0, 0.5, 0.1])
@pytest.mark.parametrize("group_size", ["tensor", None])
def test_huffman_sizes_are_foreseen(bits, within, kept, group_size):
    shape, random = (64, 4096), torch.Generator().manual_seed(bits)
    weight = torch.randn(shape, generator=random)
    if group_size == "tensor":
        weight *= torch.empty(shape).exponential_(generator=random).sqrt()
    scheme = Scheme(CodebookGrid(bits, group_size, FLOAT, huffman=True), 1 - kept if kept < 1 else 0.0)
    mask = torch.rand(shape, generator=random) < kept if kept < 1 else None
    parts = to_parts(kmeans(weight, scheme.grid, kept=mask), scheme)
    foreseen = parts_bytes(shape, scheme, weight.numel() if mask is None else int(mask.sum()), 4)
    assert sum(part.nbytes for part in parts.values()) == pytest.approx(foreseen, rel=within)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
def test_a_product_runs_as_two_linears(dtype, transposed):
    from transformers.pytorch_utils import Conv1D

    weight, scheme = CASES["coded factors"]
    layer = (Conv1D(12, 20) if transposed else torch.nn.Linear(20, 12)).to(dtype)
    layer.bias.data.normal_()
    module = runner_for(layer, scheme, weight)
    dense = weight.dense().to(dtype)
    x = torch.randn(2, 3, 20, dtype=dtype)
    expected = torch.nn.functional.linear(x, dense, layer.bias)
    torch.testing.assert_close(module(x), expected, rtol=2e-2, atol=2e-2 if dtype == torch.bfloat16 else 1e-5)
    stored = module.state_dict()["weight"]
    assert stored.shape == layer.weight.shape and stored.dtype == dtype
    assert sum(part.numel() for part in (module.left, module.right)) == 3 * (12 + 20)
    assert "rank=3" in repr(module)


def test_a_step_after_low_rank_compresses_both_factors():
    """The left factor sees what the rounded right one makes of the inputs."""
    inputs = naive.correlated(100, 20)
    gram = Gram(20)
    gram.update(inputs)
    plain = svd(WEIGHT, 3, FLOAT)
    seen = []

    def method(given):
        seen.append(given)
        return gptq(given.weight, given.statistics[Gram].value, GRID)

    result = factors.apply(method, LinearInput(WEIGHT, {Gram: gram}, None, FLOAT), plain)
    assert torch.equal(result.right.codes, gptq(plain.right.dense(), gram.value, GRID).codes)
    between = inputs @ result.right.dense().T
    torch.testing.assert_close(seen[1].statistics[Gram].value, between.T @ between, rtol=1e-3, atol=1e-2)
    assert seen[1].statistics[Gram].tokens == 100
    assert torch.equal(factors.apply(lambda given: Dense(given.weight), seen[0], None).dense(), seen[0].weight)
