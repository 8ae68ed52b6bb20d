"""FP8, MXFP8, MXFP4 and NVFP4 in compressed-tensors, against the library's own decoder."""

from __future__ import annotations

import itertools

import pytest
import torch

from format_cases import FLOATS, compress, grid, random_weight, spec
from penjing.errors import FormatError
from penjing.formats import FORMATS
from penjing.numerics.float_grids import FloatGrid
from penjing.representations import Activations, Scheme

library = pytest.importorskip("compressed_tensors.compressors")
TARGET = FORMATS["compressed-tensors"]
MODULE, OTHER = spec(48, 96), spec(48, 96, name="model.layers.0.mlp.up_proj")
FP8 = Activations(kind="float")
NAMES = ("fp8", "fp8 tensor", "fp8 block", "mxfp8", "mxfp4", "nvfp4")
EXPERT = spec(48, 96, name="model.layers.0.mlp.experts.3.up_proj")


def stored_in(on: FloatGrid, dtype: torch.dtype) -> FloatGrid:
    plain = {"scale_dtype": dtype} if on.scale == "plain" else {}
    return FloatGrid(on.element, on.group_size, on.scale, rounding=on.rounding, tile_rows=on.tile_rows, **plain)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("stored", "loaded"), [*itertools.product([torch.bfloat16, torch.float16, torch.float32], repeat=2)]
)
@pytest.mark.parametrize("sparsity", [0.0, 0.3])
def test_decodes_like_the_library_bit_for_bit(name, stored, loaded, sparsity):
    from compressed_tensors.quantization import QuantizationConfig

    scheme = Scheme(stored_in(FLOATS[name], stored), sparsity)
    weight = compress(random_weight(48, 96) * 0.02, scheme)
    tensors = TARGET.pack(MODULE, scheme, weight, stored)
    assert sum(tensor.nbytes for tensor in tensors.values()) == TARGET.nbytes(MODULE, scheme, stored)
    config = TARGET.config({MODULE: scheme}, stored)["quantization_config"]
    assert ("dequantize" in config) == (scheme.grid.scale != "plain")
    group = QuantizationConfig.model_validate({key: value for key, value in config.items() if key != "dequantize"})
    group = group.config_groups["group_0"]
    local = {key.rpartition(".")[2]: value for key, value in tensors.items()}
    if scheme.grid.scale == "plain":
        local["weight_scale"] = local["weight_scale"].to(loaded)
    theirs = library.BaseCompressor.get_value_from_registry(group.format).decompress(local, group)["weight"]
    assert torch.equal(theirs.to(loaded), TARGET.decode(weight, loaded))
    back = TARGET.unpack(MODULE, scheme, tensors.__getitem__)
    assert torch.equal(TARGET.decode(back, loaded), TARGET.decode(weight, loaded))


@pytest.mark.parametrize(
    ("module", "scheme", "words"),
    [
        (MODULE, Scheme(FLOATS["nf4"]), "bitsandbytes for nf4"),
        (MODULE, Scheme(FLOATS["fp8 e5m2"]), "no place"),
        (MODULE, Scheme(FloatGrid("e4m3", 32)), "no place"),
        (MODULE, Scheme(FloatGrid("e2m1", 16, "e8m0")), "no place"),
        (spec(48, 80), Scheme(FLOATS["mxfp4"]), "groups of 32, which mxfp4 has, do not divide the 80 inputs"),
        (EXPERT, Scheme(FLOATS["nvfp4"]), "only as FP8 per channel or tensor"),
        (EXPERT, Scheme(FLOATS["fp8 block"]), "only as FP8 per channel or tensor"),
        (MODULE, Scheme(FLOATS["fp8"], activations=Activations()), "inputs of type fp8"),
        (MODULE, Scheme(grid(8, None), activations=Activations(threshold=6.0)), "no place for `threshold`"),
    ],
)
def test_what_it_cannot_hold(module, scheme, words):
    problems = TARGET.problems(module, scheme)
    assert len(problems) == 1
    assert words in problems[0]


def test_coded_scales_need_one_scheme_for_the_model():
    four, eight = Scheme(FLOATS["nvfp4"]), Scheme(FLOATS["fp8"])
    assert TARGET.conflicts({MODULE: four, OTHER: four}) == []
    assert TARGET.conflicts({MODULE: eight, OTHER: Scheme(grid(4))}) == []
    assert "nvfp4 weights" in TARGET.conflicts({MODULE: four, OTHER: eight})[0]
    with pytest.raises(FormatError, match="mxfp4 weights"):
        TARGET.config({MODULE: Scheme(FLOATS["mxfp4"], activations=FP8)}, torch.float32)


@pytest.mark.parametrize(
    "how",
    [
        Activations(),
        FP8,
        Activations(symmetric=False),
        Activations(4),
        Activations(dynamic=False, granularity="tensor"),
    ],
    ids=lambda how: f"{how.kind}{how.bits} {how.label}",
)
def test_inputs_are_read_back(how):
    on = FLOATS["fp8"] if how.kind == "float" else grid(8, None)
    scheme = Scheme(on, activations=how)
    config = TARGET.config({MODULE: scheme}, torch.float32) | {"dtype": "float32"}
    assert TARGET.schemes(config, (MODULE,)) == {MODULE.name: scheme}
