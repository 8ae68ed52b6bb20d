"""Float grids against definitions written out value by value, and against the libraries whose formats they are."""

from __future__ import annotations

import math

import pytest
import torch

from penjing.methods.quantization.rtn import rtn
from penjing.numerics.float_grids import FloatGrid, elements
from penjing.numerics.scale_codes import ScaleCodes, dynamic_map, encode_e8m0, encode_nested, round_to_power_of_two

MXFP4, MXFP8, NVFP4 = FloatGrid("e2m1", 32, "e8m0"), FloatGrid("e4m3", 32, "e8m0"), FloatGrid("e2m1", 16, "e4m3")
NF4, FP4, FP8 = FloatGrid("nf4", 64), FloatGrid("fp4", 64), FloatGrid("e4m3", None)
ALL = (NF4, FP4, FP8, FloatGrid("e5m2", "tensor"), FloatGrid("nf4", 64, "nested"), MXFP4, MXFP8, NVFP4)


def ieee(code: int, exponent_bits: int, mantissa_bits: int) -> float:
    """The value of a bit pattern, by the definition of a float with subnormals."""
    bias = 2 ** (exponent_bits - 1) - 1
    sign = -1.0 if code >> (exponent_bits + mantissa_bits) else 1.0
    exponent = (code >> mantissa_bits) % 2**exponent_bits
    fraction = (code % 2**mantissa_bits) / 2**mantissa_bits
    return sign * (2.0 ** (1 - bias) * fraction if exponent == 0 else 2.0 ** (exponent - bias) * (1 + fraction))


@pytest.mark.parametrize(
    ("element", "exponent", "mantissa", "finite"), [("e2m1", 2, 1, 8), ("e4m3", 4, 3, 127), ("e5m2", 5, 2, 124)]
)
def test_elements_are_what_their_bits_say(element, exponent, mantissa, finite):
    half = 2 ** (exponent + mantissa)
    values = elements(element).tolist()
    for code in (*range(finite), *range(half, half + finite)):
        assert values[code] == ieee(code, exponent, mantissa)
    assert max(values[:finite]) == FloatGrid(element, None).largest


def test_nf4_is_made_of_normal_quantiles():
    """Eight steps up from the middle, seven down, both to the same outermost quantile (QLoRA, appendix E)."""
    normal = torch.distributions.Normal(0.0, 1.0)
    up = normal.icdf(torch.linspace(0.9677083, 0.5, 9, dtype=torch.float64)[:-1])
    down = -normal.icdf(torch.linspace(0.9677083, 0.5, 8, dtype=torch.float64)[:-1])
    expected = torch.cat([down, torch.zeros(1), up.flip(0)]) / up.max()
    torch.testing.assert_close(elements("nf4").double(), expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("grid", [NF4, FP4, FP8, FloatGrid("e5m2", None), FloatGrid("e2m1", None)])
def test_codes_are_the_nearest_elements(grid):
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(2000, generator=generator) * grid.largest / 2
    one = torch.ones(())
    got = grid.decode(grid.encode(values, one), one).double()
    levels = elements(grid.element).double()
    levels = levels[levels.isfinite()]
    best = (values.double().unsqueeze(1) - levels).abs().amin(1)
    assert torch.equal((values.double() - got).abs(), best)


@pytest.mark.parametrize(
    ("grid", "pairs"),
    [
        (MXFP4, {0.25: 0, 0.75: 1, 1.25: 1, 1.75: 2, 2.5: 2, 3.5: 4, 5: 4, 7: 6, 1e30: 6}),
        (FP8, {2**-10: 0, 3 * 2**-10: 2**-8, 17: 16, 19: 20, 448: 448, 464: 448, 500: 448, 1e30: 448}),
        (FloatGrid("e5m2", None), {2**-17: 0, 4.5: 4, 5.5: 6, 61440: 57344, 1e30: 57344}),
    ],
)
def test_ties_go_to_even_and_large_values_saturate(grid, pairs):
    one = torch.ones(())
    for sign in (1, -1):
        values = sign * torch.tensor(list(pairs), dtype=torch.float32)
        expected = sign * torch.tensor([float(value) for value in pairs.values()])
        assert torch.equal(grid.decode(grid.encode(values, one), one), expected)


@pytest.mark.parametrize(("limit", "shift"), [(6.0, 2), (448.0, 8)])
def test_the_three_rules_for_a_power_of_two(limit, shift):
    largest = torch.cat(
        [torch.tensor([1.0, 1.75, 1.7499999, 1.999, 6.0, 6.0000005, 448.0]), torch.rand(500) * 9 + 1e-3]
    )
    floor, near, ceil = (round_to_power_of_two(largest, limit, rule).tolist() for rule in ("floor", "round", "ceil"))
    for number, m in enumerate(largest.tolist()):
        power = math.floor(math.log2(m))
        assert floor[number] == 2.0 ** (power - shift)
        assert near[number] == 2.0 ** (power - shift + (m / 2**power >= 1.75))
        assert m / ceil[number] <= limit * (1 + 1e-6) < 2 * m / ceil[number] * (1 + 3e-6)
    assert round_to_power_of_two(torch.zeros(3), limit, "ceil").tolist() == [1, 1, 1]
    extreme = round_to_power_of_two(torch.tensor([1e-44, 3e38]), limit, "floor")
    assert torch.equal(encode_e8m0(extreme.unsqueeze(0)).decode().squeeze(0), extreme)
    assert (extreme > 0).all() and extreme.isfinite().all()


def test_the_worked_example():
    grid = FloatGrid("e2m1", 4, "e8m0", rounding="floor")
    done = rtn(torch.tensor([[0.7, -0.3, 0.1, 0.0]]), grid)
    assert done.scale.tolist() == [[0.125]]
    assert done.dense().tolist() == [[0.75, -0.25, 0.125, 0]]
    assert done.codes.tolist() == [[7, 12, 2, 0]]


def test_nvfp4_by_its_definition():
    weight = torch.randn(20, 48)
    done = rtn(weight, NVFP4)
    coded = done.scale_codes
    shared = 448 * 6 / weight.abs().max()
    torch.testing.assert_close(coded.shared, shared.reshape(1), rtol=1e-6, atol=0)
    blocks = weight.reshape(20, 3, 16).abs().amax(-1)
    expected = (coded.shared * (blocks / 6)).to(torch.float8_e4m3fn)
    assert torch.equal(coded.codes, expected.view(torch.uint8))
    assert coded.codes.max() == 126  # the block with the largest weight uses all of E4M3
    assert torch.equal(done.scale, expected.float() / coded.shared)


def test_blocks_share_a_scale_over_rows_and_columns():
    weight = torch.randn(300, 200)
    grid = FloatGrid("e4m3", 128, tile_rows=128)
    scale, _ = grid.fit_rows(weight)
    assert scale.shape == (300, 2)
    for row in (0, 128, 256):
        for number, column in enumerate((0, 128)):
            expected = weight[row : row + 128, column : column + 128].abs().max() / 448
            assert (scale[row : row + 128, number] == expected).all()
    assert grid.scale_count((300, 200)) == 6


def test_double_quantisation_by_its_definition():
    scale = torch.rand(9, 100) + 0.1
    coded = encode_nested(scale)
    offset, blocks = coded.shared[0], coded.shared[1:]
    assert offset == scale.mean() and len(blocks) == 4
    flat = (scale - offset).flatten()
    for number, block in enumerate(flat.split(256)):
        assert blocks[number] == block.abs().max()
    error = (coded.decode() - scale).flatten().abs()
    nearest = (flat / blocks.repeat_interleave(256)[:900]).unsqueeze(1) - dynamic_map()
    best = nearest.abs().amin(1) * blocks.repeat_interleave(256)[:900]
    torch.testing.assert_close(error, best, rtol=0, atol=1e-6)
    assert (encode_nested(torch.full((3, 5), 0.7)).decode() == 0.7).all()


def test_rows_of_coded_scales():
    coded = encode_nested(torch.rand(8, 128))
    assert torch.equal(coded.rows(2, 6).decode(), coded.decode()[2:6])
    with pytest.raises(ValueError, match="whole matrix"):
        coded.rows(1, 3)
    plain = ScaleCodes("e8m0", torch.full((4, 2), 127, dtype=torch.uint8), torch.empty(0))
    assert torch.equal(plain.rows(1, 3).decode(), torch.ones(2, 2))
    done = rtn(torch.randn(6, 64), NVFP4)
    assert torch.equal(done.rows(2, 4).dense(), done.dense()[2:4])
    assert done.rows(2, 4).nbytes() == 2 * 64 // 2 + 2 * 4 + 4


@pytest.mark.parametrize("grid", ALL, ids=lambda grid: grid.label)
def test_zeros_stay_zero_whatever_the_size_of_the_rest(grid):
    for size in (1e-42, 1e-6, 1.0, 1e6):
        weight = torch.randn(6, 100) * size
        weight[1], weight[2, :64], weight[:, 70] = 0, 0, 0
        done = rtn(weight, grid).dense()
        assert done.isfinite().all()
        assert (done[weight == 0] == 0).all()
    assert (rtn(torch.zeros(3, 64), grid).dense() == 0).all()


@pytest.mark.parametrize(
    ("grid", "expected"),
    [
        *((NF4, 0.00844), (FP4, 0.01487), (FP8, 7.0e-4), (MXFP4, 0.01258), (NVFP4, 0.0092)),
        (FloatGrid("e2m1", 32, "e8m0", rounding="floor"), 0.01307),
    ],
    ids=lambda value: getattr(value, "label", ""),
)
def test_distortion_of_a_normal_distribution(grid, expected):
    """Measured with the libraries that define the formats, on other samples; NVFP4 by compressed-tensors."""
    weight = torch.randn(128, 2048, generator=torch.Generator().manual_seed(1))
    assert float((rtn(weight, grid).dense() - weight).square().mean()) == pytest.approx(expected, rel=0.02)


def _library_args(grid: FloatGrid):
    from compressed_tensors.quantization import QuantizationArgs

    strategy = {"e8m0": "group", "e4m3": "tensor_group"}[grid.scale]
    dtype = torch.uint8 if grid.scale == "e8m0" else torch.float8_e4m3fn
    return QuantizationArgs(
        num_bits=grid.bits, type="float", strategy=strategy, group_size=grid.group_size, scale_dtype=dtype
    )


@pytest.mark.parametrize("grid", [MXFP4, MXFP8, NVFP4], ids=lambda grid: grid.label)
def test_the_same_numbers_as_compressed_tensors(grid):
    utils = pytest.importorskip("compressed_tensors.quantization.utils")
    from compressed_tensors.quantization.lifecycle.forward import quantize

    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(2))
    args, done = _library_args(grid), rtn(weight, grid)
    groups = weight.reshape(64, -1, grid.group_size)
    shared = utils.generate_gparam(weight.amin(), weight.amax()) if grid.scale == "e4m3" else None
    scale, _ = utils.calculate_qparams(groups.amin(-1), groups.amax(-1), args, global_scale=shared)
    if shared is not None:
        assert torch.equal(done.scale_codes.shared, shared)
        assert torch.equal(done.scale, scale.float() / shared)
    else:
        assert torch.equal(done.scale, scale.float())
    theirs = quantize(weight, scale.float(), None, args, global_scale=shared)
    ours = elements(grid.element)[done.codes.int()]
    assert (theirs.float() != ours).float().mean() <= 1e-3  # ties, after another order of operations
    assert (theirs.float() - ours).abs().max() <= FloatGrid(grid.element, None).largest / 3


@pytest.mark.parametrize("element", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_same_numbers_as_bitsandbytes(element, dtype):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(3)).to(dtype)
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type=element)
    assert torch.equal(state.code, elements(element))
    done = rtn(weight, FloatGrid(element, 64))
    assert torch.equal(done.scale.flatten(), state.absmax)
    theirs = torch.cat([packed >> 4, packed & 15], 1).flatten().reshape(96, 256)
    differ = elements(element)[theirs.int()] != elements(element)[done.codes.int()]
    decoded = functional.dequantize_4bit(packed, state).float()
    ours, exact = done.dense()[differ], weight.float()[differ]
    assert differ.float().mean() <= 1e-3  # ties: they multiply by 1 / absmax
    torch.testing.assert_close((ours - exact).abs(), (decoded[differ] - exact).abs(), rtol=2**-7, atol=0)
    assert torch.equal(done.dense().to(dtype).float()[~differ], decoded[~differ])


def test_the_same_scales_as_bitsandbytes():
    functional = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(functional.create_dynamic_map(), dynamic_map())
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(4))
    packed, state = functional.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    done = rtn(weight, FloatGrid("nf4", 64, "nested"))
    coded = done.scale_codes
    assert coded.shared[0] == state.offset
    assert torch.equal(coded.shared[1:], state.state2.absmax)
    differ = (coded.codes.flatten().int() - state.absmax.int()).abs()
    assert differ.max() <= 1 and (differ > 0).float().mean() < 5e-3  # ties
    theirs = functional.dequantize_4bit(packed, state)
    assert (done.dense() - weight).square().mean() <= (theirs - weight).square().mean()
