"""Our reading of compressed-tensors against the library's own, in every storage dtype."""

from __future__ import annotations

import itertools

import pytest
import torch

from format_cases import quantise, random_weight, spec
from penjing.formats import FORMATS
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Activations, Scheme

library = pytest.importorskip("compressed_tensors.compressors")
TARGET = FORMATS["compressed-tensors"]
MODULE = spec(48, 96)


def through_library(scheme: Scheme, tensors: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """What the library decodes when transformers has loaded floating tensors in `dtype`."""
    from compressed_tensors.quantization import QuantizationConfig

    config = QuantizationConfig.model_validate(
        {
            key: value
            for key, value in TARGET.config({MODULE: scheme}, dtype)["quantization_config"].items()
            if key != "dequantize"
        }
    )
    group = config.config_groups["group_0"]
    local = {key.rpartition(".")[2]: value for key, value in tensors.items()}
    local["weight_scale"] = local["weight_scale"].to(dtype)
    return library.BaseCompressor.get_value_from_registry(group.format).decompress(local, group)["weight"]


@pytest.mark.parametrize(
    ("stored", "loaded"), [*itertools.product([torch.bfloat16, torch.float16, torch.float32], repeat=2)]
)
@pytest.mark.parametrize("symmetric", [True, False])
def test_decodes_like_the_library_bit_for_bit(stored, loaded, symmetric):
    sizes, rules = (16, None, "tensor"), ("full", "signed-max") if symmetric else ("full",)
    for bits, size, rule, activations in itertools.product(range(2, 9), sizes, rules, (None, Activations())):
        scheme = Scheme(IntegerGrid(bits, size, symmetric, rule, stored), activations=activations)
        if activations and not symmetric and bits < 8 and size != "tensor":
            continue  # a conflict: see test_refusals
        weight = quantise(random_weight(48, 96, bits), scheme.grid)
        tensors = TARGET.pack(MODULE, scheme, weight, stored)
        decoded = through_library(scheme, tensors, loaded)
        assert decoded.dtype == loaded
        assert torch.equal(decoded, TARGET.decode(weight, loaded)), scheme
        if stored == loaded:
            assert torch.equal(decoded, weight.dense().to(loaded))


def test_negative_scales_keep_their_sign():
    scheme = Scheme(IntegerGrid(4, 16, True, "signed-max", torch.bfloat16))
    weight = quantise(random_weight(48, 96), scheme.grid)
    assert (weight.scale < 0).any()
    back = TARGET.unpack(MODULE, scheme, TARGET.pack(MODULE, scheme, weight, torch.bfloat16).__getitem__)
    assert torch.equal(back.scale, weight.scale)
    assert torch.equal(back.codes, weight.codes)


def test_one_scheme_is_targeted_by_class_and_several_by_expression():
    layers = [spec(8, 32, name=f"model.layers.{i}.mlp.{part}_proj") for i in range(2) for part in ("up", "down")]
    head = spec(50, 32, "head", "lm_head")
    table = spec(50, 32, "embedding", "model.embed_tokens")
    four, eight = Scheme(IntegerGrid(4, 16)), Scheme(IntegerGrid(8, None), activations=Activations())

    def config(**chosen: Scheme) -> dict:
        schemes = {module: chosen.get(module.name.rpartition(".")[2], Scheme()) for module in (table, *layers, head)}
        return TARGET.config(schemes, torch.bfloat16)["quantization_config"]

    one = config(up_proj=four, down_proj=four)
    assert one["config_groups"]["group_0"]["targets"] == ["Linear"]
    assert one["ignore"] == ["lm_head"]
    assert (one["format"], one["quant_method"]) == ("pack-quantized", "compressed-tensors")
    assert one["quantization_status"] == "compressed"
    assert "dequantize" not in one
    some = config(up_proj=four)
    assert some["ignore"] == [r"re:model\.layers\.\d+\.mlp\.down_proj$", "lm_head"]
    two = config(up_proj=four, down_proj=eight)
    assert two["format"] == "mixed-precision"
    assert [group["targets"] for group in two["config_groups"].values()] == [
        [rf"re:model\.layers\.\d+\.mlp\.{part}_proj$"] for part in ("up", "down")
    ]
    inputs = two["config_groups"]["group_1"]["input_activations"]
    assert (inputs["num_bits"], inputs["strategy"], inputs["dynamic"], inputs["symmetric"]) == (8, "token", True, True)
    assert config(up_proj=four, down_proj=four, lm_head=four)["ignore"] == []
    assert config(embed_tokens=four)["dequantize"] is True


def test_nothing_quantised_needs_no_config():
    assert TARGET.config({MODULE: Scheme(), spec(8, 8, name="x"): Scheme(sparsity=0.5)}, torch.bfloat16) == {}
