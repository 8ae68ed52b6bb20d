"""Every type of GGUF: codes go into blocks and come back, and the gguf package reads the values they stand for."""

from __future__ import annotations

import math

import pytest
import torch

from penjing.errors import FormatError
from penjing.formats import FORMATS
from penjing.formats.gguf import GGUFFormat
from penjing.formats.gguf.types import blocks_of, type_of
from penjing.methods.quantization.gptq import gptq
from penjing.methods.quantization.rtn import rtn
from penjing.models.layout import ModuleSpec
from penjing.numerics.float_grids import FloatGrid
from penjing.numerics.gguf_grids import GGUF_GRIDS
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Masked, Scheme

gguf = pytest.importorskip("gguf")

GRIDS = {**GGUF_GRIDS, "mxfp4": FloatGrid("e2m1", 32, "e8m0")}
ROWS, COLUMNS = 12, 768
MODULE = ModuleSpec("a.linear", "linear", 0, {"weight": (ROWS, COLUMNS)})


def ugly(rows: int = ROWS, columns: int = COLUMNS) -> torch.Tensor:
    """A dead row, a constant super-block, a row far from zero, an outlier channel, tiny numbers."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(1)) / 16
    weight[:, 5] *= 20
    weight[0] = 0
    weight[1, :256] = 0.3
    weight[2] = weight[2].abs() + 1
    weight[3] *= 1e-9
    weight[4] = -weight[4].abs()
    return weight


@pytest.mark.parametrize("name", GRIDS)
def test_the_gguf_package_reads_the_values(name):
    from gguf.quants import dequantize

    grid = GRIDS[name]
    held = type_of(grid)
    assert held == name.upper()
    kind, blocks = gguf.GGMLQuantizationType[held], blocks_of(grid)
    assert gguf.GGML_QUANT_SIZES[kind] == (blocks.width, blocks.size)
    for metric in (None, torch.ones(COLUMNS)):
        weight = rtn(ugly(), grid, metric=metric)
        written = blocks.write(weight)
        assert written.shape == (ROWS, COLUMNS // blocks.width * blocks.size)
        assert torch.equal(torch.from_numpy(dequantize(written.numpy(), kind)), weight.dense())
        back = blocks.read(written, COLUMNS)
        assert torch.equal(back.codes, weight.codes)
        assert torch.equal(back.dense(), weight.dense())
        assert torch.isfinite(weight.dense()).all()
        assert weight.nbytes() == written.numel() or name == "tq1_0"  # whose last byte of a block holds 4 codes, not 5


@pytest.mark.parametrize("name", GRIDS)
def test_any_bytes_are_codes_of_the_grid(name):
    """Bytes that another program wrote: what is read and written again is the same, up to the sign of zero."""
    blocks = blocks_of(GRIDS[name])
    data = torch.randint(256, (3, 2 * blocks.size), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    weight = blocks.read(data, 2 * blocks.width)
    again = blocks.write(weight)
    if name == "tq1_0":  # 256 bytes for 243 numbers: several mean the same
        assert torch.equal(blocks.read(again, 2 * blocks.width).codes, weight.codes)
        again, data = blocks.write(blocks.read(again, 2 * blocks.width)), again
    assert torch.equal(again, data)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_1", "q8_0", "tq2_0"])
def test_rounding_to_nearest_is_that_of_the_package(name):
    """Up to scales that it keeps in fp32 while it rounds."""
    from gguf.quants import dequantize, quantize

    kind, weight = gguf.GGMLQuantizationType[name.upper()], ugly()
    theirs = torch.from_numpy(dequantize(quantize(weight.numpy(), kind), kind)) - weight
    ours = rtn(weight, GRIDS[name]).dense() - weight
    assert ours.square().sum() <= 1.001 * theirs.square().sum()


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "iq4_nl", "q6_k", "q4_k", "q3_k", "q2_k", "tq2_0"])
def test_a_search_loses_less(name):
    weight, cost = ugly(), torch.rand(COLUMNS, generator=torch.Generator().manual_seed(3)) + 0.01

    def loss(metric: torch.Tensor | None) -> float:
        return float(((rtn(weight, GRIDS[name], metric=metric).dense() - weight).square() * cost).sum())

    assert loss(cost) < loss(None)
    assert math.isclose(loss(torch.diag(cost)), loss(cost), rel_tol=1e-3)


@pytest.mark.parametrize("name", ["q4_0", "q4_k", "iq4_nl", "q3_k"])
def test_gptq_runs_on_the_grid(name):
    """Its result decodes bit for bit from the bytes, and its loss is below that of rounding to nearest."""
    generator = torch.Generator().manual_seed(4)
    mixing = torch.randn(COLUMNS, COLUMNS, generator=generator) / 20 + torch.eye(COLUMNS)
    inputs = torch.randn(2 * COLUMNS, COLUMNS, generator=generator) @ mixing
    gram = inputs.T @ inputs
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    grid = GRIDS[name]

    def loss(found: torch.Tensor) -> float:
        return float((((found - weight) @ gram) * (found - weight)).sum())

    ours = gptq(weight, gram, grid, scale_search="diagonal")
    assert loss(ours.dense()) < 0.7 * loss(rtn(weight, grid).dense())
    packed = GGUFFormat().pack(MODULE, Scheme(grid), ours, torch.float32)
    back = GGUFFormat().unpack(MODULE, Scheme(grid), packed.__getitem__)
    assert torch.equal(back.dense(), ours.dense())


def test_grids_that_differ_in_how_scales_are_chosen_are_one_type():
    assert type_of(IntegerGrid(4, 32, True, "narrow", torch.float16)) == "Q4_0"
    assert type_of(IntegerGrid(4, 32, True, "full", torch.bfloat16)) is None
    assert type_of(IntegerGrid(4, 64, True, "full", torch.float16)) is None


def test_removed_weights_stay_zero():
    weight = ugly()
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(5)) > 0.5
    scheme = Scheme(GRIDS["q4_0"], sparsity=0.5)
    masked = rtn(weight, GRIDS["q4_0"], kept=kept)
    assert isinstance(masked, Masked)
    form = GGUFFormat()
    assert form.problems(MODULE, scheme) == []
    back = form.unpack(MODULE, scheme, form.pack(MODULE, scheme, masked, torch.float32).__getitem__)
    assert torch.equal(back.dense(), masked.dense())


@pytest.mark.parametrize(
    ("scheme", "module", "reason"),
    [
        (Scheme(IntegerGrid(4, 64)), MODULE, "no type of GGUF holds W4 g64"),
        (Scheme(GRIDS["q4_k"]), ModuleSpec("m", "linear", 0, {"weight": (4, 576)}), "no whole blocks of 256"),
        (Scheme(GRIDS["q4_0"]), ModuleSpec("m", "linear", 0, {"weight": (4, 40)}), "no whole blocks of 32"),
        (Scheme(GRIDS["q4_1"], sparsity=0.5), MODULE, "no exact zero"),
        (Scheme(GRIDS["iq4_nl"], sparsity=0.5), MODULE, "no exact zero"),
        (Scheme(GRIDS["q4_0"], ordered=True), MODULE, "consecutive inputs"),
    ],
)
def test_what_does_not_fit_is_refused(scheme, module, reason):
    (problem,) = GGUFFormat().problems(module, scheme)
    assert reason in problem
    assert module.name in problem


@pytest.mark.parametrize("name", ["native", "compressed-tensors", "bitsandbytes"])
@pytest.mark.parametrize("kind", ["q4_k", "q6_k"])
def test_k_quants_are_for_gguf_only(name, kind):
    problems = FORMATS[name].problems(MODULE, Scheme(GRIDS[kind]))
    assert problems
    assert name == "bitsandbytes" or "gguf" in problems[0]


def test_a_scale_beyond_fp16_is_an_error():
    weight = rtn(ugly() * 1e7, GRIDS["q4_0"])
    with pytest.raises(FormatError, match="does not fit fp16"):
        GGUFFormat().pack(MODULE, Scheme(GRIDS["q4_0"]), weight, torch.float32)
