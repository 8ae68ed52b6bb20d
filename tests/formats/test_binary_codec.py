"""Binary-coded weights in the native format: exact bytes, the same values back, masks, damage."""

import pytest
import torch

from penjing.errors import FormatError
from penjing.formats import FORMATS
from penjing.formats.native.layout import from_parts, parts_bytes, to_parts
from penjing.methods.quantization.bcq import bcq
from penjing.models.layout import ModuleSpec
from penjing.numerics.binary_coding import BinaryGrid
from penjing.representations import Masked, Scheme

GRIDS = [
    BinaryGrid(bits, size, scale, offset)
    for bits in (1, 3, 8)
    for size, scale, offset in ((16, torch.bfloat16, None), (None, torch.float32, torch.float32))
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("sparse", [False, True])
def test_round_trip(grid, sparse):
    weight = torch.randn(7, 37, generator=torch.Generator().manual_seed(0))
    kept = weight.abs() > 0.5 if sparse else None
    coded = bcq(weight, grid, rounds=1, kept=kept)
    count = weight.numel() if kept is None else int(kept.sum())
    scheme = Scheme(grid=grid, sparsity=1 - count / weight.numel())
    parts = to_parts(coded, scheme)
    assert sum(part.nbytes for part in parts.values()) == parts_bytes((7, 37), scheme, count, 4)
    back, read = from_parts(parts, "module")
    assert read == scheme
    assert isinstance(back, Masked) == sparse
    assert torch.equal(back.dense(), coded.dense())


def test_damage_is_named():
    coded = bcq(torch.randn(4, 16), BinaryGrid(2, 16))
    parts = to_parts(coded, Scheme(grid=coded.grid))
    with pytest.raises(FormatError, match="weight_alpha missing"):
        from_parts({key: value for key, value in parts.items() if key != "alpha"}, "module")
    with pytest.raises(FormatError, match="weight_planes"):
        from_parts(parts | {"planes": parts["planes"][:1]}, "module")


@pytest.mark.parametrize("name", ["compressed-tensors", "bitsandbytes"])
def test_other_formats_refuse(name):
    module = ModuleSpec("model.layers.0.mlp.up_proj", "linear", {"weight": (32, 32)}, 0)
    assert FORMATS[name].problems(module, Scheme(grid=BinaryGrid(3, 16)))
