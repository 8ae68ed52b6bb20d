"""Our reading and writing of the 4-bit format against the library's own functions."""

from __future__ import annotations

import json

import pytest
import torch

import runs
from format_cases import FLOATS, compress, grid, random_weight, spec
from penjing.errors import FormatError, MissingDependency
from penjing.formats import FORMATS, format_of
from penjing.formats.bitsandbytes import _require_library
from penjing.numerics.float_grids import FloatGrid
from penjing.representations import Activations, Scheme

functional = pytest.importorskip("bitsandbytes.functional")
TARGET = FORMATS["bitsandbytes"]
MODULE = spec(48, 96)
NF4, NESTED = Scheme(FLOATS["nf4"]), Scheme(FLOATS["nf4 double-quantised"])


@pytest.mark.parametrize("name", ["nf4", "nf4 double-quantised", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparsity", [0.0, 0.3])
def test_the_library_decodes_what_we_pack(name, dtype, sparsity):
    scheme = Scheme(FLOATS[name], sparsity)
    weight = compress(random_weight(48, 96).to(dtype), scheme)
    tensors = TARGET.pack(MODULE, scheme, weight, dtype)
    assert sum(tensor.nbytes for tensor in tensors.values()) == TARGET.nbytes(MODULE, scheme, dtype)
    local = {key.removeprefix(f"{MODULE.name}.weight.") or "weight": value for key, value in tensors.items()}
    packed = local.pop(f"{MODULE.name}.weight")
    state = functional.QuantState.from_dict(local, torch.device("cpu"))
    assert (state.dtype, tuple(state.shape)) == (dtype, MODULE.shape)
    assert torch.equal(functional.dequantize_4bit(packed, state), TARGET.decode(weight, dtype))
    back = TARGET.unpack(MODULE, scheme, tensors.__getitem__)
    assert torch.equal(back.dense(), weight.dense())


@pytest.mark.parametrize("nested", [False, True])
def test_we_read_what_the_library_packs(nested):
    packed, state = functional.quantize_4bit(
        random_weight(48, 96), blocksize=32, compress_statistics=nested, quant_type="nf4"
    )
    stored = {f"{MODULE.name}.weight": packed}
    stored |= {f"{MODULE.name}.weight.{key}": value for key, value in state.as_dict(packed=True).items()}
    back = TARGET.unpack(MODULE, NESTED if nested else NF4, stored.__getitem__)
    assert torch.equal(back.dense(), functional.dequantize_4bit(packed, state))


def test_the_offset_does_not_change_the_size():
    sizes = set()
    for factor in (1.0, 1e-9, 12345.678, 0.0):
        weight = compress(random_weight(48, 96) * factor, NESTED)
        state = TARGET.pack(MODULE, NESTED, weight, torch.float32)[
            f"{MODULE.name}.weight.quant_state.bitsandbytes__nf4"
        ]
        sizes.add(state.numel())
        assert json.loads(bytes(state.tolist()))["nested_offset"] == float(weight.scale_codes.shared[0])
    assert len(sizes) == 1


@pytest.mark.parametrize(
    ("module", "scheme", "words"),
    [
        (MODULE, Scheme(grid(4, 32)), "stores types nf4 and fp4, and 8 bits"),
        (MODULE, Scheme(FLOATS["mxfp4"]), "stores types nf4 and fp4"),
        (MODULE, Scheme(FloatGrid("nf4", 64)), "group_size 64 on the 96 inputs .* use 32"),
        (spec(48, 90), NF4, "use format native"),
        (MODULE, Scheme(FloatGrid("nf4", None)), "group_size channel"),
        (MODULE, Scheme(FloatGrid("nf4", 32), ordered=True), "group index"),
        (spec(48, 96, transposed=True), NF4, "linears of their own"),
        (spec(48, 96, "embedding"), NF4, "linears of their own"),
        (spec(48, 96, name="model.layers.0.mlp.experts.3.up_proj"), NF4, "linears of their own"),
        (MODULE, Scheme(FLOATS["nf4"], activations=Activations()), "drop `activations`"),
    ],
)
def test_what_it_cannot_hold(module, scheme, words):
    problems = TARGET.problems(module, scheme)
    assert len(problems) == 1
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(problems[0])


def test_one_type_per_model():
    other = spec(48, 96, name="model.layers.0.mlp.up_proj")
    assert TARGET.conflicts({MODULE: NF4, other: Scheme(FLOATS["nf4"], 0.5)}) == []
    assert "one type" in TARGET.conflicts({MODULE: NF4, other: NESTED})[0]
    with pytest.raises(FormatError, match="one type"):
        TARGET.config({MODULE: NF4, other: NESTED}, torch.float32)
    assert TARGET.config({MODULE: Scheme(sparsity=0.5)}, torch.float32) == {}


def test_the_head_is_left_out_unless_chosen():
    head = spec(50, 96, "head", "lm_head")
    config = TARGET.config({MODULE: NF4, head: Scheme()}, torch.float32)["quantization_config"]
    assert "lm_head" in config["llm_int8_skip_modules"]
    config = TARGET.config({MODULE: NF4, head: NF4}, torch.float32)
    assert config["quantization_config"]["llm_int8_skip_modules"] == []
    assert format_of(config) is TARGET
    assert TARGET.schemes(config, (MODULE, head)) == {MODULE.name: NF4, "lm_head": NF4}
    foreign = {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "quant_method": "bitsandbytes"}
    assert TARGET.schemes({"quantization_config": foreign}, (MODULE, head)) == {MODULE.name: Scheme(FloatGrid("fp4"))}
    with pytest.raises(FormatError, match="neither load_in_4bit nor load_in_8bit"):
        TARGET.schemes({"quantization_config": {"quant_method": "bitsandbytes"}}, (MODULE,))


def test_a_checkpoint_that_contradicts_itself():
    tensors = TARGET.pack(MODULE, NF4, compress(random_weight(48, 96), NF4), torch.float32)
    with pytest.raises(FormatError, match=r"config\.json makes it"):
        TARGET.unpack(MODULE, Scheme(FloatGrid("nf4", 64)), tensors.__getitem__)
    tensors[f"{MODULE.name}.weight.quant_map"] += 1
    with pytest.raises(FormatError, match="quant_map"):
        TARGET.unpack(MODULE, NF4, tensors.__getitem__)
    with pytest.raises(FormatError, match="not what its scheme says"):
        TARGET.pack(MODULE, NF4, compress(random_weight(48, 96), NESTED), torch.float32)


def test_the_library_is_asked_for_by_name(monkeypatch):
    _require_library.cache_clear()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingDependency, match="pip install bitsandbytes accelerate"):
        TARGET.problems(MODULE, NF4)
    monkeypatch.undo()
    _require_library.cache_clear()


def test_a_bf16_model_answers_in_transformers_as_in_memory(tiny_model, tmp_path):
    """Beside 4-bit codes transformers keeps stored parameters in bf16, whatever dtype it is asked for."""
    model = tiny_model("llama", dtype="bfloat16", hidden_size=64, inner=128)
    wanted = runs.recipe(
        runs.texts(tmp_path), {"method": "rtn", "type": "nf4", "group_size": 64}, format="bitsandbytes"
    )
    report = runs.compress(model, wanted, tmp_path / "out", engine=True, evaluated=False)
    assert report.verification["how"] == "transformers" and report.verification["difference"] < 1e-5
