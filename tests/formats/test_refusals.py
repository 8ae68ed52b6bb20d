"""What a format cannot hold is said before anything is written, with what would fit; damage is noticed when reading."""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from format_cases import CASES, compress, float_zero, grid, random_weight, spec, write
from penjing.errors import FormatError, MissingDependency
from penjing.formats import FORMATS, format_of
from penjing.formats.compressed_tensors.schema import require_library
from penjing.models.layout import ModuleSpec
from penjing.numerics.gguf_grids import GGUF_GRIDS
from penjing.numerics.ternary import TernaryGrid
from penjing.representations import Activations, Dense, Scheme

pytest.importorskip("compressed_tensors")
CT, NATIVE, DENSE = FORMATS["compressed-tensors"], FORMATS["native"], FORMATS["dense"]
OPT_UP = "model.decoder.layers.3.fc1"
EXPERT = "model.layers.0.mlp.experts.3.up_proj"


@pytest.mark.parametrize(
    ("module", "scheme", "words"),
    [
        (
            spec(64, 576),
            Scheme(grid(4, 128)),
            "group_size 128 does not divide the 576 inputs of .*q_proj; 96, 144, 192 do",
        ),
        (spec(64, 96), Scheme(grid(4, 128)), "group_size 128 does not divide the 96 inputs"),
        (spec(64, 96), Scheme(grid(4, 32), ordered=True), "group index"),
        (spec(64, 96), Scheme(float_zero(4, 32)), r"not whole numbers \(HQQ\)"),
        (spec(64, 96, transposed=True), Scheme(grid(4, 32)), "Conv1D"),
        (spec(64, 96), Scheme(activations=Activations()), "only together with its weight"),
        (spec(64, 96, "embedding"), Scheme(grid(8, None), activations=Activations()), "token number"),
        (spec(64, 96, name=OPT_UP), Scheme(grid(8, None), activations=Activations()), "OPT flattens"),
        (spec(64, 96, name=EXPERT), Scheme(grid(4, 32, False)), "experts only with symmetric"),
        (spec(64, 96, name=EXPERT), Scheme(grid(8, None), activations=Activations()), "without `activations`"),
    ],
)
def test_compressed_tensors_says_what_it_cannot_hold(module, scheme, words):
    (problem,) = CT.problems(module, scheme)
    assert re.search(words, problem)
    if scheme.activations is None:
        assert "native" in problem
        assert NATIVE.problems(module, scheme) == []


def test_dense_and_native_refuse_inputs_they_cannot_reach():
    rounded = Scheme(grid(8, None), activations=Activations())
    assert "compressed-tensors or native" in DENSE.problems(spec(8, 8), rounded)[0]
    assert "token number" in NATIVE.problems(spec(8, 8, "embedding"), rounded)[0]
    assert "fuses" in NATIVE.problems(spec(8, 8, name=EXPERT), rounded)[0]
    assert DENSE.problems(spec(8, 8), Scheme(grid(3, 5))) == []


MINIMA, LEVELS = ("q4_1", "q5_1"), ("q6_k", "q5_k", "q4_k", "q3_k", "q2_k")


@pytest.mark.parametrize("name", [name for name in FORMATS if name not in ("gguf", "dense")])
def test_grids_with_minima_or_scales_in_two_levels_fit_only_where_they_are_known(name):
    """Packed as plain codes they would be read as other numbers."""
    for kind in (*MINIMA, *LEVELS):
        problems = FORMATS[name].problems(spec(512, 512), Scheme(GGUF_GRIDS[kind]))
        assert bool(problems) != (name == "native" and kind in MINIMA), kind


@pytest.mark.parametrize("name", ["onnx", "gptq", "gptq-v2", "native"])
def test_ternary_codes_come_back(name):
    pytest.importorskip("onnxruntime")
    scheme = Scheme(TernaryGrid(2, 32, True, "full", torch.float32))
    weight = compress(random_weight(64, 96), scheme)
    module, target = spec(64, 96), FORMATS[name]
    assert target.problems(module, scheme) == []
    packed = target.pack(module, scheme, weight, torch.float32)
    assert torch.equal(target.unpack(module, scheme, packed.__getitem__).dense(), weight.dense())
    told = target.config({module: scheme}, torch.float32)
    read = target.schemes({**told, "dtype": "float32"}, (module,))[module.name]  # as any other program reads it
    assert torch.equal(target.unpack(module, read, packed.__getitem__).dense(), weight.dense())


def conflict(*schemes: tuple[ModuleSpec, Scheme]) -> str:
    return "; ".join(CT.conflicts(dict(schemes)))


def test_what_fits_alone_but_not_together():
    q, up = spec(64, 96), spec(64, 96, name="model.layers.0.mlp.up_proj")
    table = spec(300, 96, "embedding", "model.embed_tokens")
    four, eight, zeros = Scheme(grid(4, 32)), Scheme(grid(8, None)), Scheme(grid(4, 32, False))
    assert conflict((q, zeros), (up, zeros), (table, zeros)) == ""
    assert conflict((q, four), (up, eight)) == ""
    assert "packed zero points" in conflict((q, zeros), (up, eight))
    assert "quantised embedding" in conflict((q, four), (table, eight))
    assert "quantised embedding" in conflict((q, Scheme(grid(8, None), activations=Activations())), (table, eight))
    assert NATIVE.conflicts({q: zeros, up: eight, table: four}) == []
    with pytest.raises(FormatError, match="packed zero points"):
        CT.config({q: zeros, up: eight}, torch.float32)


def test_experts_must_be_alike():
    q = spec(64, 96)
    experts = [spec(64, 96, name=f"model.layers.0.mlp.experts.{number}.up_proj") for number in range(2)]
    four, eight = Scheme(grid(4, 32)), Scheme(grid(8, None))
    assert conflict((q, eight), *((expert, four) for expert in experts)) == ""
    assert conflict(*((module, Scheme()) for module in (q, *experts))) == ""
    assert "all its experts" in conflict((q, four), *((expert, Scheme()) for expert in experts))
    assert "all its experts" in conflict((experts[0], four), (experts[1], eight))
    assert NATIVE.conflicts({q: four, experts[0]: Scheme(), experts[1]: Scheme()}) == []
    assert "one scheme" in NATIVE.conflicts({experts[0]: four, experts[1]: eight})[0]


def test_the_library_is_asked_for_by_name(monkeypatch):
    require_library.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="pip install compressed-tensors"):
        CT.problems(spec(64, 96), Scheme(grid(4, 32)))
    assert CT.problems(spec(64, 96), Scheme()) == []


@pytest.mark.parametrize("target", [CT, NATIVE])
def test_a_weight_that_is_not_of_its_scheme_is_refused(target):
    with pytest.raises(FormatError, match="not what its scheme says"):
        target.pack(spec(8, 32), Scheme(grid(4)), Dense(random_weight(8, 32)), torch.float32)
    with pytest.raises(FormatError, match="not what its scheme says"):
        target.pack(spec(8, 32), Scheme(), compress(random_weight(8, 32), Scheme(grid(4))), torch.float32)


def test_foreign_quantisation_is_refused():
    assert format_of({}).name == "dense"
    with pytest.raises(FormatError, match="'exl2'"):
        format_of({"quantization_config": {"quant_method": "exl2"}})
    fp6 = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {
            "group_0": {"targets": ["Linear"], "weights": {"num_bits": 6, "type": "float", "strategy": "channel"}}
        },
    }
    with pytest.raises(FormatError, match="these weights cannot be read"):
        CT.schemes({"quantization_config": fp6}, (spec(8, 8),))
    with pytest.raises(FormatError, match="version 2"):
        NATIVE.schemes({"quantization_config": {"quant_method": "penjing", "version": 2, "schemes": []}}, ())


def packed_parts() -> tuple[ModuleSpec, Scheme, dict[str, torch.Tensor]]:
    module, scheme = spec(8, 40), Scheme(grid(3, 16, False), sparsity=0.5)
    return module, scheme, NATIVE.pack(module, scheme, compress(random_weight(8, 40), scheme), torch.float32)


@pytest.mark.parametrize("part", ["codes", "scale", "zero_point", "mask"])
def test_truncated_parts_are_noticed(part):
    module, scheme, tensors = packed_parts()
    key = f"{module.name}.weight_{part}"
    damaged = tensors | {key: tensors[key].flatten()[:-1]}
    with pytest.raises(FormatError, match=rf"{module.name}"):
        NATIVE.unpack(module, scheme, damaged.__getitem__)


def test_config_and_file_must_agree():
    _, scheme, tensors = packed_parts()
    with pytest.raises(FormatError, match=r"config\.json says"):
        NATIVE.unpack(spec(8, 80), scheme, tensors.__getitem__)


@pytest.mark.parametrize("wrong", ["codes dropped", "module dropped", "module added", "config shortened", "stray part"])
def test_a_damaged_native_checkpoint_does_not_load(wrong, tiny_model, tmp_path):
    from penjing import transformers_hook

    transformers_hook.install()
    from transformers import AutoModelForCausalLM

    item = write(CASES["native, 3 bits"], tiny_model("llama", tied=False), tmp_path)
    path = item.directory / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.1.mlp.up_proj.weight"
    if wrong == "codes dropped":
        del tensors[f"{name}_codes"]
    elif wrong == "module dropped":
        tensors = {key: value for key, value in tensors.items() if "up_proj" not in key}
    elif wrong == "module added":
        tensors |= {
            f"model.norm.weight_{part}": tensors[f"{name}_{part}"].clone() for part in ("header", "codes", "scale")
        }
    elif wrong == "config shortened":
        config = item.config["quantization_config"]
        config["schemes"][0]["targets"] = [
            target for target in config["schemes"][0]["targets"] if "up_proj" not in target
        ]
        (item.directory / "config.json").write_text(json.dumps(item.config))
    else:
        tensors[f"{name}_values"] = torch.zeros(3)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises((FormatError, RuntimeError), match=r"up_proj|model\.norm|conversion of the weights"):
        AutoModelForCausalLM.from_pretrained(item.directory)
