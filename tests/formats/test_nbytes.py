"""The size a plan promises is the size that is written."""

from __future__ import annotations

import itertools

import pytest
import torch

from format_cases import FLOATS, compress, grid, random_weight, spec
from penjing.formats import FORMATS
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Activations, Scheme

pytest.importorskip("compressed_tensors")

SHAPES = [(33, 96), (7, 45), (64, 130)]
GRIDS = [
    grid(bits, size, symmetric)
    for bits, size, symmetric in itertools.product((2, 3, 4, 5, 8), (None, "tensor", 5, 16, 200), (True, False))
] + list(FLOATS.values())
ORDERED = {on for on in GRIDS if isinstance(on, IntegerGrid) and isinstance(on.group_size, int)}


def size(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("name", ["dense", "compressed-tensors", "native"])  # others have tests of their own
@pytest.mark.parametrize("shape", SHAPES)
def test_exact_for_every_grid(name, shape):
    target, module, checked = FORMATS[name], spec(*shape), 0
    for on, activations, ordered in itertools.product(GRIDS, (None, Activations()), (False, True)):
        scheme = Scheme(on, activations=activations, ordered=ordered and on in ORDERED)
        if target.problems(module, scheme):
            continue
        weight = compress(random_weight(*shape), scheme)
        assert size(target.pack(module, scheme, weight, torch.bfloat16)) == target.nbytes(
            module, scheme, torch.bfloat16
        )
        checked += 1
    assert checked >= 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("on", [None, grid(4, 16), grid(3, None, False)])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 1 / 3, 0.93])
def test_sparsity_within_one_percent(dtype, on, sparsity):
    target, module, scheme = FORMATS["native"], spec(64, 130), Scheme(on, sparsity)
    weight = compress(random_weight(64, 130), scheme, dtype)
    written = size(target.pack(module, scheme, weight, dtype))
    assert target.nbytes(module, scheme, dtype) == pytest.approx(written, rel=0.01)


@pytest.mark.parametrize("pattern", [(2, 4), (1, 4), (4, 8)])
def test_patterns_are_exact(pattern):
    target, module = FORMATS["native"], spec(32, 64)
    for on in (None, grid(4, 16)):
        scheme = Scheme(on, pattern[0] / pattern[1], pattern)
        weight = compress(random_weight(32, 64), scheme)
        written = size(target.pack(module, scheme, weight, torch.float32))
        assert target.nbytes(module, scheme, torch.float32) == written


def test_biases_and_modules_without_a_weight_are_counted():
    from penjing.models.layout import ModuleSpec

    module = ModuleSpec("m.q_proj", "linear", 0, {"weight": (8, 32), "bias": (8,)})
    head = ModuleSpec("lm_head", "head", None, {})
    for name, target in FORMATS.items():
        bias = 8 * (4 if name == "gguf" else 2)  # GGUF keeps vectors in fp32
        assert target.nbytes(module, Scheme(), torch.bfloat16) == 8 * 32 * 2 + bias
        assert target.nbytes(head, Scheme(), torch.bfloat16) == 0
    four = Scheme(grid(4, None))
    header = (
        '{"bits": 4, "grid": "integer", "group_size": "channel", "scale_dtype": "float32", "scale_rule": "full", '
        '"shape": [8, 32], "symmetric": true}'
    )
    assert FORMATS["native"].nbytes(module, four, torch.bfloat16) == 8 * 32 // 2 + 8 * 4 + len(header) + 8 * 2
    assert FORMATS["compressed-tensors"].nbytes(module, four, torch.bfloat16) == 8 * 32 // 2 + 8 * 4 + 16 + 8 * 2
