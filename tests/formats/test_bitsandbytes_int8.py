"""LLM.int8() on disk against the library's own functions, and in transformers with the library on a CPU."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from format_cases import compress, random_weight, spec
from penjing import api
from penjing.checkpoint import open_checkpoint
from penjing.errors import FormatError, PlanError
from penjing.formats import FORMATS
from penjing.models import layout_of
from penjing.numerics.activations import Activations
from penjing.numerics.grids import IntegerGrid
from penjing.pipeline.stream import StreamedModel
from penjing.pipeline.weights import Weights
from penjing.representations import Scheme
from tiny_models import token_windows

functional = pytest.importorskip("bitsandbytes.functional")
TARGET = FORMATS["bitsandbytes"]
MODULE = spec(48, 96)
HOW = Activations(threshold=6.0)


def scheme(dtype: torch.dtype = torch.float32, **keys: object) -> Scheme:
    return Scheme(IntegerGrid(8, None, True, "narrow", dtype), activations=HOW, **keys)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sparsity", [0.0, 0.3])
def test_the_library_decodes_what_we_pack(dtype, sparsity):
    chosen = scheme(dtype, sparsity=sparsity)
    weight = compress(random_weight(48, 96), chosen)
    tensors = TARGET.pack(MODULE, chosen, weight, dtype)
    assert sum(tensor.nbytes for tensor in tensors.values()) == TARGET.nbytes(MODULE, chosen, dtype)
    codes, largest = tensors[f"{MODULE.name}.weight"], tensors[f"{MODULE.name}.SCB"]
    torch.testing.assert_close(functional.int8_vectorwise_dequant(codes, largest), weight.dense(), rtol=3e-7, atol=0)
    back = TARGET.unpack(MODULE, chosen, tensors.__getitem__)
    assert torch.equal(back.dense(), weight.dense()) and back.scale.dtype == dtype


def test_codes_and_scales_are_those_of_the_library():
    weight = random_weight(48, 96).half().float()  # what it rounds to itself
    codes, largest, _ = functional.int8_vectorwise_quant(weight.half())
    tensors = TARGET.pack(MODULE, scheme(), compress(weight, scheme()), torch.float32)
    assert torch.equal(tensors[f"{MODULE.name}.SCB"], largest)
    assert (tensors[f"{MODULE.name}.weight"].int() - codes.int()).abs().max() <= 1  # ties, which it meets in fp16
    assert (tensors[f"{MODULE.name}.weight"] == codes).float().mean() > 0.99


def test_scales_that_no_stored_number_divides_to():
    weight = compress(random_weight(48, 96), scheme())
    refused = 0
    for step in range(300):  # the multiples of 1 / 127 among fp32 numbers are 1 in 127 too few
        weight.scale.copy_(torch.full_like(weight.scale, 1.5 + step * 2**-23))
        try:
            TARGET.pack(MODULE, scheme(), weight, torch.float32)
        except FormatError as error:
            refused += 1
            assert "bfloat16" in str(error)
    assert 0 < refused < 10


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        (Scheme(scheme().grid), "use method llm-int8"),
        (Scheme(scheme().grid, activations=Activations(dynamic=False)), "per token"),
        (scheme(columns=2), "format native"),
        (Scheme(IntegerGrid(8, 32, scale_dtype=torch.float32), activations=HOW), "drop `activations`"),
    ],
)
def test_what_it_cannot_hold(chosen, words):
    assert words in TARGET.problems(MODULE, chosen)[0]


def test_one_threshold_per_model():
    other = spec(48, 96, name="model.layers.0.mlp.up_proj")
    assert TARGET.conflicts({MODULE: scheme(), other: Scheme(scheme().grid, activations=Activations())})
    config = TARGET.config({MODULE: scheme()}, torch.float32)
    assert config["quantization_config"]["llm_int8_threshold"] == 6.0
    read = TARGET.schemes(config, (MODULE,))[MODULE.name]
    assert read.activations == HOW and read.grid.bits == 8


def test_a_checkpoint_that_contradicts_itself():
    tensors = TARGET.pack(MODULE, scheme(), compress(random_weight(48, 96), scheme()), torch.float32)
    with pytest.raises(FormatError, match="weight_format 0"):
        TARGET.unpack(MODULE, scheme(), {**tensors, f"{MODULE.name}.weight_format": torch.tensor(2)}.__getitem__)
    with pytest.raises(FormatError, match="makes it"):
        TARGET.unpack(MODULE, scheme(), {**tensors, f"{MODULE.name}.SCB": torch.ones(3)}.__getitem__)


def test_transformers_runs_a_whole_model(tiny_model, tmp_path):
    """The library's codes are ours to the bit; logits differ by inputs that fall to the other side of a step."""
    from transformers import AutoModelForCausalLM

    source = tiny_model("llama")
    recipe = {"steps": [{"method": "llm-int8"}], "format": "bitsandbytes"}
    report = api.compress(source, recipe, tmp_path / "out", evaluated=False)
    assert report.verification["how"] == "streamed"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    linear = model.get_submodule("model.layers.0.mlp.up_proj")
    stored = load_file(next((tmp_path / "out").glob("model-00002-*")))
    assert type(linear).__name__ == "Linear8bitLt" and linear.state.threshold == 6.0
    assert torch.equal(linear.weight.data, stored["model.layers.0.mlp.up_proj.weight"])
    tokens = token_windows(1, 24)
    with torch.no_grad():
        found = model(tokens).logits
    checkpoint = open_checkpoint(tmp_path / "out")
    layout = layout_of(checkpoint.config, checkpoint.specs())
    stream = StreamedModel(checkpoint.config, layout, Weights(checkpoint, layout).live)
    with stream.head(torch.float32) as head:
        expected = head(stream.forward(tokens, torch.float32))
    divergence = torch.nn.functional.kl_div(
        found.log_softmax(-1), expected.log_softmax(-1), log_target=True, reduction="none"
    )
    assert divergence.sum(-1).mean() < 0.02
    inputs = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    weight = functional.int8_vectorwise_dequant(linear.weight.data, stored["model.layers.0.mlp.up_proj.SCB"])
    assert (linear(inputs) - inputs @ weight.T).norm() < 0.02 * (inputs @ weight.T).norm()


def test_linears_of_gpt2_are_refused(tiny_model):
    with pytest.raises(PlanError, match="linears of their own"):
        api.plan(tiny_model("gpt2"), {"steps": [{"method": "llm-int8"}], "format": "bitsandbytes"})
