"""The layouts of GPTQ and AWQ against unpackers written from their definitions, code by code, in plain integers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from format_cases import compress, float_zero, grid, random_weight, spec
from penjing.errors import FormatError
from penjing.formats import FORMATS, format_of
from penjing.formats.words import from_words, to_words
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Activations, Quantized, Scheme

V1, V2, AWQ = FORMATS["gptq"], FORMATS["gptq-v2"], FORMATS["awq"]
ROWS, COLUMNS = 32, 64
MODULE = spec(ROWS, COLUMNS)
UP = spec(ROWS, COLUMNS, name="model.layers.0.mlp.up_proj")


def streams(words: Tensor) -> list[int]:
    """Every row of words as one long integer, the first word lowest."""
    return [sum((word % 2**32) << 32 * place for place, word in enumerate(row)) for row in words.tolist()]


def plain(words: Tensor) -> list[list[int]]:
    """Words as unsigned Python integers."""
    return [[word % 2**32 for word in row] for row in words.tolist()]


def gptq_values(tensors: dict[str, Tensor], bits: int, version: int) -> Tensor:
    """`scale * (code - zero)` one weight at a time, from the words."""
    weight, zeros, mask = streams(tensors["qweight"].T), streams(tensors["qzeros"]), 2**bits - 1
    scales, groups = tensors["scales"].tolist(), tensors["g_idx"].tolist()
    less = 1 if version == 1 else 0

    def value(row: int, column: int, group: int) -> float:
        code, zero = weight[row] >> column * bits & mask, zeros[group] >> row * bits & mask
        return scales[group][row] * (code - zero - less)

    values = [[value(row, column, group) for column, group in enumerate(groups)] for row in range(ROWS)]
    return torch.tensor(values, dtype=torch.float64)


def awq_values(tensors: dict[str, Tensor]) -> Tensor:
    weight, zeros, scales = plain(tensors["qweight"]), plain(tensors["qzeros"]), tensors["scales"].tolist()
    place = {output: position for position, output in enumerate([0, 2, 4, 6, 1, 3, 5, 7])}
    size = COLUMNS // len(zeros)

    def value(row: int, column: int) -> float:
        word, shift, group = row // 8, 4 * place[row % 8], column // size
        return scales[group][row] * ((weight[column][word] >> shift & 15) - (zeros[group][word] >> shift & 15))

    values = [[value(row, column) for column in range(COLUMNS)] for row in range(ROWS)]
    return torch.tensor(values, dtype=torch.float64)


def local(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.removeprefix(f"{MODULE.name}."): value for key, value in tensors.items()}


GPTQ_SCHEMES = [
    (version, Scheme(grid(bits, size, symmetric), ordered=ordered))
    for version, symmetric in ((1, True), (2, True), (2, False))
    for bits in (2, 3, 4, 8)
    for size, ordered in ((16, False), (None, False), (16, True))
]


@pytest.mark.parametrize(("version", "scheme"), GPTQ_SCHEMES)
def test_gptq_bit_for_bit(version, scheme):
    target = {1: V1, 2: V2}[version]
    assert target.problems(MODULE, scheme) == []
    weight = compress(random_weight(ROWS, COLUMNS), scheme)
    tensors = target.pack(MODULE, scheme, weight, torch.float32)
    assert sum(tensor.nbytes for tensor in tensors.values()) == target.nbytes(MODULE, scheme, torch.float32)
    assert torch.equal(gptq_values(local(tensors), scheme.grid.bits, version).float(), weight.dense())
    assert_same(target.unpack(MODULE, scheme, tensors.__getitem__), weight)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [8, 16, None])
@pytest.mark.parametrize("sparsity", [0.0, 0.4])
def test_awq_bit_for_bit(symmetric, size, sparsity):
    scheme = Scheme(grid(4, size, symmetric), sparsity)
    assert AWQ.problems(MODULE, scheme) == []
    weight = compress(random_weight(ROWS, COLUMNS), scheme)
    tensors = AWQ.pack(MODULE, scheme, weight, torch.float32)
    assert sum(tensor.nbytes for tensor in tensors.values()) == AWQ.nbytes(MODULE, scheme, torch.float32)
    assert torch.equal(awq_values(local(tensors)).float(), weight.dense())
    assert torch.equal(AWQ.unpack(MODULE, scheme, tensors.__getitem__).dense(), weight.dense())


def assert_same(back: Quantized, weight: Quantized) -> None:
    for part in ("codes", "scale", "zero_point", "group_index"):
        ours, theirs = getattr(back, part), getattr(weight, part)
        assert (ours is None) == (theirs is None) and (ours is None or torch.equal(ours, theirs)), part


def test_the_words_of_the_worked_examples():
    eight = torch.arange(-8, 0, dtype=torch.int8)[None]
    assert to_words(eight, 8, 4).item() == 0x76543210
    assert from_words(to_words(eight, 8, 4), 8, 4, 8).tolist() == eight.tolist()
    weight = Quantized(torch.zeros(8, 8, dtype=torch.int8), torch.ones(8, 1), None, grid(4, None))
    for target, word in ((V1, 0x77777777), (V2, 0x88888888 - 2**32), (AWQ, 0x88888888 - 2**32)):
        zeros = target.pack(spec(8, 8), Scheme(grid(4, None)), weight, torch.float32)[f"{MODULE.name}.qzeros"]
        assert zeros.flatten().tolist() == [word]
    column = Quantized(eight.T.expand(8, 8).contiguous(), torch.ones(8, 1), None, grid(4, None))
    stored = AWQ.pack(spec(8, 8), Scheme(grid(4, None)), column, torch.float32)[f"{MODULE.name}.qweight"]
    assert stored[0].item() == 0x75316420


def test_bf16_scales_round_once():
    scheme = Scheme(IntegerGrid(8, 16, False, scale_dtype=torch.bfloat16))
    weight = compress(random_weight(ROWS, COLUMNS), scheme)
    exact = weight.dense().double()
    assert torch.equal(V2.decode(weight, torch.bfloat16), exact.to(torch.bfloat16))


def test_foreign_zero_points_of_version_1():
    """A reader of version 1 adds the one back; a stored zero point of all ones is the 0 that it could not say."""
    scheme = Scheme(grid(4, 16, False))
    weight = compress(random_weight(ROWS, COLUMNS), scheme)
    tensors = V2.pack(MODULE, scheme, weight, torch.float32)
    stored = from_words(tensors[f"{MODULE.name}.qzeros"], 0, 4, ROWS)
    tensors[f"{MODULE.name}.qzeros"] = to_words((stored - 1) % 16, 0, 4)
    assert_same(V1.unpack(MODULE, scheme, tensors.__getitem__), weight)


@pytest.mark.parametrize(
    ("target", "module", "scheme", "words"),
    [
        (V1, MODULE, Scheme(grid(4, 16, False)), "cannot store a zero point of 0; use format gptq-v2"),
        (V1, MODULE, Scheme(grid(5, 16)), "codes of 2, 3, 4, 8 bits, not 5"),
        (AWQ, MODULE, Scheme(grid(8, 16)), "codes of 4 bits, not 8"),
        (AWQ, MODULE, Scheme(grid(4, 16), ordered=True), "no group index"),
        (V1, MODULE, Scheme(grid(4, 24)), "group_size 24 does not divide the 64 inputs of .*; 16, 32, 64 do"),
        (V1, MODULE, Scheme(grid(4, "tensor")), "use `group_size: channel`"),
        (V1, spec(36, 64), Scheme(grid(4, 16)), "36 outputs of 4 bits do not fill 32-bit words"),
        (AWQ, spec(36, 64), Scheme(grid(4, 16)), "36 outputs of 4 bits do not fill 32-bit words"),
        (V1, spec(32, 60), Scheme(grid(4, None)), "60 inputs of 4 bits do not fill"),
        (V1, spec(32, 64, "embedding"), Scheme(grid(4, 16)), "linears of the blocks"),
        (AWQ, spec(32, 64, name="model.layers.0.mlp.experts.3.up_proj"), Scheme(grid(4, 16)), "no experts"),
        (V2, MODULE, Scheme(float_zero(4, 16)), "whole zero points only"),
        (AWQ, MODULE, Scheme(grid(4, 16), activations=Activations()), "drop `activations`"),
    ],
)
def test_what_they_cannot_hold(target, module, scheme, words):
    (problem,) = target.problems(module, scheme)
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(problem)


def test_one_grid_per_model():
    four, eight = Scheme(grid(4, 16)), Scheme(grid(8, 16))
    for target in (V1, AWQ):
        assert target.conflicts({MODULE: four, UP: Scheme(grid(4, 16), 0.5)}) == []
        assert "one grid per model" in target.conflicts({MODULE: four, UP: Scheme(grid(4, 32))})[0]
        with pytest.raises(FormatError, match="one grid"):
            target.config({MODULE: four, UP: Scheme(grid(4, 32))}, torch.float32)
        assert target.config({MODULE: Scheme()}, torch.float32) == {}
    assert "one grid" in V1.conflicts({MODULE: four, UP: eight})[0]
    other = spec(ROWS, COLUMNS, name="model.layers.1.self_attn.q_proj")
    assert "another block does not" in V1.conflicts({MODULE: four, other: Scheme()})[0]
    assert AWQ.conflicts({MODULE: four, other: Scheme()}) == []


@pytest.mark.parametrize("target", [V1, V2, AWQ], ids=lambda target: target.name)
def test_config_says_which_linears_are_coded(target):
    head = spec(50, 96, "head", "lm_head")
    chosen = Scheme(IntegerGrid(4, 16, target is V1, scale_dtype=torch.float16))
    config = target.config({MODULE: chosen, UP: Scheme(), head: Scheme()}, torch.float16) | {"dtype": "float16"}
    assert format_of(config) is target
    assert target.schemes(config, (MODULE, UP, head)) == {MODULE.name: chosen}


def test_configs_that_penjing_does_not_read():
    told = {"quant_method": "gptq", "bits": 4, "group_size": 128}
    for more in ({"lm_head": True}, {"dynamic": {"+:.*up_proj": {"bits": 8}}}):
        with pytest.raises(FormatError, match="quantised head or other bits"):
            V1.schemes({"quantization_config": told | more}, (MODULE,))
    with pytest.raises(FormatError, match="GEMM"):
        AWQ.schemes({"quantization_config": {"quant_method": "awq", "bits": 4, "version": "gemv"}}, (MODULE,))


def test_damage_is_noticed():
    scheme = Scheme(grid(4, 16))
    for target in (V1, AWQ):
        tensors = target.pack(MODULE, scheme, compress(random_weight(ROWS, COLUMNS), scheme), torch.float32)
        for part, found in (("qweight", "has shape"), ("qzeros", "has shape"), ("scales", "has shape")):
            key = f"{MODULE.name}.{part}"
            with pytest.raises(FormatError, match=found):
                target.unpack(MODULE, scheme, (tensors | {key: tensors[key][:-1]}).__getitem__)
        key = f"{MODULE.name}.qzeros"
        with pytest.raises(FormatError, match=r"config\.json says `sym`"):
            target.unpack(MODULE, scheme, (tensors | {key: tensors[key] + 1}).__getitem__)
    key = f"{MODULE.name}.g_idx"
    tensors = V1.pack(MODULE, scheme, compress(random_weight(ROWS, COLUMNS), scheme), torch.float32)
    with pytest.raises(FormatError, match="desc_act"):
        V1.unpack(MODULE, scheme, (tensors | {key: tensors[key].flip(0)}).__getitem__)
    ordered = Scheme(grid(4, 16), ordered=True)
    with pytest.raises(FormatError, match="do not exist"):
        V1.unpack(MODULE, ordered, (tensors | {key: tensors[key] + 1}).__getitem__)
