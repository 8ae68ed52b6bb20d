"""Binary-coded weights in the native format: exact bytes, the same values back, masks, damage."""

import pytest
import torch

from penjing.errors import FormatError
from penjing.formats import FORMATS
from penjing.formats.native.layout import from_parts, parts_bytes, to_parts
from penjing.methods.binarization.billm import billm
from penjing.methods.binarization.onebit import onebit
from penjing.methods.binarization.ternary import ternary
from penjing.methods.quantization.bcq import bcq
from penjing.models.layout import ModuleSpec
from penjing.numerics.binary_coding import BinaryGrid
from penjing.numerics.ternary import TernaryGrid
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


@pytest.mark.parametrize("name", ["onebit", "billm"])
@pytest.mark.parametrize("sparse", [False, True])
def test_values_of_inputs_and_scattered_groups(name, sparse):
    weight = torch.randn(7, 80, generator=torch.Generator().manual_seed(0))
    kept = weight.abs() > 0.5 if sparse else None
    if name == "onebit":
        coded = onebit(weight, kept=kept)
    else:
        coded = billm(weight, torch.eye(80), BinaryGrid(2, 16), kept=kept)
    count = weight.numel() if kept is None else int(kept.sum())
    grid = (coded.values if sparse else coded).grid
    scheme = Scheme(grid=grid, sparsity=1 - count / weight.numel(), ordered=name == "billm")
    parts = to_parts(coded, scheme)
    assert sum(part.nbytes for part in parts.values()) == parts_bytes((7, 80), scheme, count, 4)
    back, read = from_parts(parts, "module")
    assert read == scheme and torch.equal(back.dense(), coded.dense())


@pytest.mark.parametrize("size", [16, None, "tensor"])
def test_ternary_round_trip(size):
    grid = TernaryGrid(group_size=size)
    coded = ternary(torch.randn(7, 37, generator=torch.Generator().manual_seed(0)), grid)
    parts = to_parts(coded, Scheme(grid=grid))
    assert sum(part.nbytes for part in parts.values()) == parts_bytes((7, 37), Scheme(grid=grid), 7 * 37, 4)
    assert parts["trits"].nbytes + parts["scale"].nbytes == coded.nbytes()
    back, read = from_parts(parts, "module")
    assert read == Scheme(grid=grid) and torch.equal(back.dense(), coded.dense())
    with pytest.raises(FormatError, match="weight_trits"):
        from_parts(parts | {"trits": parts["trits"][1:]}, "module")
