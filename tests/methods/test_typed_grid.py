"""What `type` fixes, what it refuses, and that every method which offers it works on every float grid."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from penjing.formats.native.layout import from_parts, to_parts
from penjing.methods.quantization.awq import AWQOptions
from penjing.methods.quantization.gptq import GPTQOptions, gptq
from penjing.methods.quantization.rtn import rtn
from penjing.methods.typed_grid import TypedGridOptions
from penjing.numerics.float_grids import FloatGrid
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Masked, Quantized, Scheme

KINDS = [
    *({"type": "nf4"}, {"type": "nf4", "double_quant": True}, {"type": "fp4", "group_size": 20}),
    *({"type": "fp8-e4m3"}, {"type": "fp8-e5m2", "group_size": "tensor"}, {"type": "fp8-e4m3", "group_size": "block"}),
    *({"type": "mxfp4"}, {"type": "mxfp8", "scale_rounding": "floor"}, {"type": "nvfp4"}),
]


@pytest.mark.parametrize(
    ("keys", "grid"),
    [
        ({}, IntegerGrid(4, 128)),
        ({"type": "nf4"}, FloatGrid("nf4", 64)),
        ({"type": "fp4", "double_quant": True, "group_size": -1}, FloatGrid("fp4", None, "nested")),
        ({"type": "fp8-e4m3"}, FloatGrid("e4m3", None, scale_dtype=torch.bfloat16)),
        (
            {"type": "fp8-e4m3", "group_size": "block"},
            FloatGrid("e4m3", 128, scale_dtype=torch.bfloat16, tile_rows=128),
        ),
        ({"type": "mxfp4", "scale_rounding": "floor"}, FloatGrid("e2m1", 32, "e8m0", rounding="floor")),
        ({"type": "nvfp4", "bits": 4, "group_size": 16}, FloatGrid("e2m1", 16, "e4m3")),
    ],
)
def test_a_type_fixes_the_grid(keys, grid):
    options = TypedGridOptions(**keys)
    assert options.grid(torch.bfloat16) == grid
    assert options.bits == grid.bits
    assert TypedGridOptions.model_validate(options.model_dump(mode="json")) == options


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"type": "nf4", "bits": 8}, "fixes `bits: 4`"),
        ({"type": "fp8-e4m3", "symmetric": False}, "fixes `symmetric: True`"),
        ({"type": "mxfp4", "group_size": 64}, "fixes `group_size: 32`"),
        ({"type": "nvfp4", "scale_rule": "narrow"}, "fixes `scale_rule: full`"),
        ({"type": "mxfp8", "double_quant": True}, "nf4 or fp4"),
        ({"double_quant": True}, "nf4 or fp4"),
        ({"type": "nf4", "double_quant": True, "group_size": "tensor"}, "groups or rows"),
        ({"scale_rounding": "ceil"}, "power of two"),
        ({"group_size": "block"}, "fp8"),
        ({"type": "nf4", "group_size": "block"}, "fp8"),
        ({"type": "int5"}, "type"),
    ],
)
def test_what_does_not_go_with_a_type(keys, words):
    with pytest.raises(ValidationError, match=words):
        TypedGridOptions(**keys)


@pytest.mark.parametrize("keys", [{"type": "nvfp4"}, {"type": "nf4", "double_quant": True}])
def test_scales_coded_together_cannot_be_fitted_in_the_sweep(keys):
    with pytest.raises(ValidationError, match="static_groups: true"):
        GPTQOptions(static_groups=False, **keys)


def test_awq_refuses_blocks_and_forgets_its_zero_point():
    with pytest.raises(ValidationError, match="not `block`"):
        AWQOptions(type="fp8-e4m3", group_size="block")
    assert AWQOptions(type="nf4").symmetric


@pytest.mark.parametrize("keys", KINDS, ids=lambda keys: " ".join(map(str, keys.values())))
@pytest.mark.parametrize("pruned", [False, True])
def test_gptq_beats_rounding_on_every_grid(keys, pruned):
    torch.manual_seed(0)
    weight = torch.randn(48, 72)
    weight[:, 7], weight[5] = 3.0, 0
    inputs = torch.randn(300, 72) @ (torch.eye(72) + 0.3 * torch.randn(72, 72))
    inputs[:, 11] = 0
    kept = torch.rand(48, 72) > 0.3 if pruned else None
    grid = TypedGridOptions(**keys).grid(torch.float32)
    plain, swept = rtn(weight, grid, kept=kept), gptq(weight, inputs.T @ inputs, grid, kept=kept)

    def loss(result: Quantized | Masked) -> float:
        return float((inputs @ (result.dense() - weight).T).square().sum())

    assert loss(swept) < loss(plain)
    for result in (plain, swept):
        assert result.dense().isfinite().all()
        assert (result.dense()[5] == 0).all()
        assert kept is None or (result.dense()[~kept] == 0).all()
        codes = result.values if isinstance(result, Masked) else result
        assert codes.codes.dtype == torch.uint8
        if codes.scale_codes is not None:
            assert torch.equal(codes.scale_codes.decode(), codes.scale)


@pytest.mark.parametrize("type_", ["mxfp4", "fp8-e4m3"])
def test_groups_fitted_in_the_sweep_are_decoded_from_what_is_stored(type_):
    torch.manual_seed(0)
    weight, inputs = torch.randn(16, 64), torch.randn(200, 64)
    grid = TypedGridOptions(type=type_, **({"group_size": 32} if type_ == "fp8-e4m3" else {})).grid(torch.bfloat16)
    result = gptq(weight, inputs.T @ inputs, grid, static_groups=False)
    assert result.group_index is not None
    assert (result.dense() - weight).square().mean() < 0.05
    if result.scale_codes is not None:
        assert torch.equal(result.scale_codes.decode(), result.scale)
    back, scheme = from_parts(to_parts(result, Scheme(grid, ordered=True)), "a module")
    assert scheme == Scheme(grid, ordered=True)
    assert torch.equal(back.dense(), result.dense())
