"""KIVI's rounding of keys and values: a naive fp64 reference, the authors' code, packing, ugly input."""

import itertools

import numpy
import pytest
import torch

from penjing.errors import PlanError
from penjing.methods.quantization.kivi import (
    KVCache,
    dequantise_keys,
    dequantise_values,
    pack_codes,
    packed_width,
    quantise_keys,
    quantise_values,
    unpack_codes,
)

BITS = (2, 3, 4, 8)


def round_trip(what, states, bits, group, scale_dtype=None):
    if what == "keys":
        packed = quantise_keys(states, bits, group, scale_dtype)
        return packed, dequantise_keys(packed, bits, states.shape[-1], states.dtype)
    packed = quantise_values(states, bits, group, scale_dtype)
    return packed, dequantise_values(packed, bits, states.shape[-1], states.dtype, group)


def naive(states, bits, group):
    """Values (T, D) per token in groups of channels, one number at a time, in fp64."""
    result = torch.zeros_like(states, dtype=torch.float64)
    for row, first in itertools.product(range(states.shape[0]), range(0, states.shape[1], group)):
        numbers = [float(number) for number in states[row, first : first + group]]
        low, step = min(numbers), (max(numbers) - min(numbers)) / (2**bits - 1)
        for place, number in enumerate(numbers):
            code = round((number - low) / step) if step else 0
            result[row, first + place] = low + step * code
    return result


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("channels", [16, 20, 6])
def test_naive_reference(bits, channels):
    states = torch.randn(24, channels, generator=torch.Generator().manual_seed(0)) * 3 + 1
    _, keys = round_trip("keys", states, bits, 8)
    _, values = round_trip("values", states, bits, 8)
    assert torch.allclose(keys.double(), naive(states.T, bits, 8).T, atol=1e-5)
    assert torch.allclose(values.double(), naive(states, bits, 8), atol=1e-5)


def test_worked_example():
    packed, keys = round_trip("keys", torch.tensor([[0.0, 5.0], [3.0, 5.0]]), 2, 2)
    assert keys.tolist() == [[0, 5], [3, 5]]
    assert packed.scale.flatten().tolist() == [1, 1]
    assert packed.minimum.flatten().tolist() == [0, 5]
    assert unpack_codes(packed.codes, 2, 2).tolist() == [[0, 0], [3, 0]]


AUTHORS = [
    ("keys", 2, 24449, 21527.109085, [-0.476674, -0.441874, -0.708574]),
    ("values", 2, 25430, 50897.505623, [-2.55136, -1.77411, -2.358518]),
    ("keys", 4, 122511, 885.857928, [0.066071, 0.00449, -1.036361]),
    ("values", 4, 126632, 1828.880737, [0.806995, -0.168338, -1.371719]),
    ("keys", 8, 2081262, 2.847852, [0.193776, -0.074281, -1.15205]),
    ("values", 8, 2152591, 6.510761, [0.214344, -0.073881, -1.139531]),
]
"""What, bits, sum of the codes, squared error, three decoded entries: from jy-yuan/KIVI at 876b4d2, quant/new_pack.py,
fp32, groups of 32, on the states below. All codes were equal to ours."""


@pytest.mark.parametrize(("what", "bits", "codes", "error", "sampled"), AUTHORS)
def test_agrees_with_the_authors_code(what, bits, codes, error, sampled):
    random = numpy.random.RandomState(0)
    states = random.standard_normal((2, 2, 64, 64)) * (1 + 9 * (random.random_sample((1, 2, 1, 64)) < 0.1))
    states = torch.from_numpy((states + random.standard_normal((1, 2, 1, 64))).astype(numpy.float32))
    packed, decoded = round_trip(what, states, bits, 32)
    assert int(unpack_codes(packed.codes, bits, 64).long().sum()) == codes
    assert float((states - decoded).double().square().sum()) == pytest.approx(error, rel=1e-5)
    places = [(0, 0, 0, 0), (1, 1, 40, 33), (0, 1, 63, 7)]
    assert [float(decoded[place]) for place in places] == pytest.approx(sampled, abs=1e-5)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("count", [1, 7, 8, 16, 20, 64])
def test_packing(bits, count):
    codes = torch.randint(2**bits, (3, 5, count), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.shape == (3, 5, packed_width(count, bits))
    assert packed.dtype == torch.uint8
    assert torch.equal(unpack_codes(packed, bits, count), codes)
    if count % 8 == 0:
        assert packed.shape[-1] == count * bits // 8


@pytest.mark.parametrize("what", ["keys", "values"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_is_half_a_step(what, dtype):
    states = (torch.randn(2, 3, 32, 16, generator=torch.Generator().manual_seed(2)) * 4 + 20).to(dtype)
    packed, decoded = round_trip(what, states, 4, 8)
    assert decoded.dtype == dtype
    grouped = (states - decoded).float().abs()
    grouped = grouped.unflatten(-2, (-1, 8)) if what == "keys" else grouped.unflatten(-1, (-1, 8))
    rounding = 40 * torch.finfo(dtype).eps  # of the scale times the largest code, and of the sum
    assert (grouped <= packed.scale.float() * (0.5 + 16 * torch.finfo(dtype).eps) + rounding).all()


@pytest.mark.parametrize("what", ["keys", "values"])
def test_constant_group_is_exact(what):
    states = torch.full((1, 1, 16, 12), -2.5)
    assert torch.equal(round_trip(what, states, 2, 8)[1], states)


def test_outlier_channel_of_keys_leaves_the_others_alone():
    states = torch.randn(64, 16, generator=torch.Generator().manual_seed(3))
    spoiled = states.clone()
    spoiled[:, 5] *= 1000
    others = [channel for channel in range(16) if channel != 5]
    assert torch.equal(
        round_trip("keys", states, 2, 32)[1][:, others], round_trip("keys", spoiled, 2, 32)[1][:, others]
    )
    assert not torch.equal(
        round_trip("values", states, 2, 32)[1][:, others], round_trip("values", spoiled, 2, 32)[1][:, others]
    )


@pytest.mark.parametrize("what", ["keys", "values"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_visible(what, bad):
    states = torch.ones(16, 16)
    states[3, 3] = bad
    decoded = round_trip(what, states, 4, 8)[1]
    assert not torch.isfinite(decoded[3, 3])
    assert torch.isfinite(decoded[9:]).all()


def test_tokens_are_whole_groups():
    with pytest.raises(ValueError, match="12 tokens are not whole groups of 8"):
        quantise_keys(torch.zeros(12, 4), 2, 8)


@pytest.mark.parametrize("what", ["keys", "values"])
def test_parts_are_cut_and_joined_without_decoding(what):
    states = torch.randn(2, 32, 20, generator=torch.Generator().manual_seed(4))
    per_scale = 8 if what == "keys" else 1
    packed = round_trip(what, states, 3, 8)[0]
    joined = packed.tokens(0, 16, per_scale).joined(packed.tokens(16, 32, per_scale))
    assert all(torch.equal(*pair) for pair in zip(joined.tensors, packed.tensors, strict=True))


def test_settings():
    assert KVCache.of(bits=2, group_size=None).label == "2 bits, groups of 32, residual 128"
    with pytest.raises(PlanError, match="KV cache: residual 100 is not a multiple of group_size 32"):
        KVCache.of(residual=100)
    with pytest.raises(PlanError, match="bits"):
        KVCache.of(bits=5)
