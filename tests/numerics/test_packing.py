"""Bits without gaps: against a naive packer in Python integers, and against compressed-tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from penjing.numerics import packing
from penjing.numerics.packing import pack_bits, packed_bytes, unpack_bits


def naive(codes: list[int], bits: int) -> bytes:
    """One large integer, the first code lowest."""
    total = sum(code << (bits * place) for place, code in enumerate(codes))
    return total.to_bytes(-(-len(codes) * bits // 8), "little")


@given(st.data())
def test_round_trip_and_layout(data):
    bits = data.draw(st.integers(1, 8))
    rows, count = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 70))
    values = data.draw(st.lists(st.integers(0, 2**bits - 1), min_size=rows * count, max_size=rows * count))
    codes = torch.tensor(values, dtype=torch.uint8).reshape(rows, count)
    packed = pack_bits(codes, bits)
    assert packed.shape == (rows, packed_bytes(count, bits))
    assert [bytes(row.tolist()) for row in packed] == [naive(row.tolist(), bits) for row in codes]
    assert torch.equal(unpack_bits(packed, bits, count), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_pieces_meet_without_a_seam(bits, monkeypatch):
    codes = torch.randint(0, 2**bits, (3, 1000), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    whole = pack_bits(codes, bits)
    monkeypatch.setattr(packing, "_CHUNK", 64)
    assert torch.equal(pack_bits(codes, bits), whole)
    assert torch.equal(unpack_bits(whole, bits, 1000), codes)


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [32, 45, 576])
def test_same_stream_as_compressed_tensors(bits, columns):
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (5, columns), dtype=torch.int8)
    words = helpers.pack_to_int32(codes, bits)
    unsigned = (codes.short() + 2 ** (bits - 1)).to(torch.uint8)
    assert torch.equal(unpack_bits(words.view(torch.uint8), bits, columns), unsigned)
    assert torch.equal(helpers.unpack_from_int32(words, bits, codes.shape), codes)
    ours = pack_bits(unsigned, bits)
    assert torch.equal(words.view(torch.uint8)[:, : ours.shape[1]], ours)


def test_no_code_takes_no_byte():
    assert pack_bits(torch.zeros(1, 0, dtype=torch.uint8), 3).shape == (1, 0)
    assert unpack_bits(torch.zeros(1, 0, dtype=torch.uint8), 3, 0).shape == (1, 0)
