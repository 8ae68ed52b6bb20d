"""Graphs for ONNX Runtime against transformers: logits, the cache, padding; packing against a plain unpacker."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from format_cases import Case, compress, float_zero, grid, linear, matrices, of_kind, random_weight, spec, write
from penjing.errors import FormatError
from penjing.formats import FORMATS, format_of
from penjing.models import layout_of
from penjing.representations import Activations, Quantized, Scheme
from tiny_models import FAMILIES

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from penjing.formats.onnx import GRAPH, session

TARGET = FORMATS["onnx"]
MODULE = spec(24, 80)
INT8 = Scheme(grid(8, None), activations=Activations())
STATIC = Scheme(grid(8, None), activations=Activations(dynamic=False, granularity="tensor"))
CLOSE = 1e-5
"""Of the largest logit: both compute in fp32 with the same weights."""


def unpacked(tensors: dict[str, torch.Tensor], bits: int, block: int, symmetric: bool) -> torch.Tensor:
    """`scale * (code - zero)` one weight at a time, from the operator's definition."""
    codes, scale = (tensors[f"{MODULE.name}.weight_{part}"] for part in ("codes", "scale"))
    per_byte, mask = 8 // bits, 2**bits - 1
    values = torch.empty(24, 80)
    for row in range(24):
        for column in range(80):
            group, place = divmod(column, block)
            code = int(codes[row, group, place // per_byte]) >> place % per_byte * bits & mask
            zero = 2 ** (bits - 1)
            if not symmetric:
                packed = tensors[f"{MODULE.name}.weight_zero_point"][row, group // per_byte]
                zero = int(packed) >> group % per_byte * bits & mask
            values[row, column] = scale[row, group] * (code - zero)
    return values


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("symmetric", [True, False])
def test_blocks_bit_for_bit(bits, block, symmetric):
    scheme = Scheme(grid(bits, block, symmetric), sparsity=0.3)
    assert TARGET.problems(MODULE, scheme) == []
    weight = compress(random_weight(24, 80), scheme)
    tensors = TARGET.pack(MODULE, scheme, weight, torch.float32)
    assert sum(tensor.nbytes for tensor in tensors.values()) == TARGET.nbytes(MODULE, scheme, torch.float32)
    assert torch.equal(unpacked(tensors, bits, block, symmetric), weight.dense())
    assert torch.equal(TARGET.unpack(MODULE, scheme, tensors.__getitem__).dense(), weight.dense())


def test_integers_come_back():
    weight = compress(random_weight(24, 80), INT8)
    tensors = TARGET.pack(MODULE, INT8, weight, torch.float32)
    assert sum(tensor.nbytes for tensor in tensors.values()) == TARGET.nbytes(MODULE, INT8, torch.float32)
    back = TARGET.unpack(MODULE, INT8, tensors.__getitem__)
    assert isinstance(back, Quantized) and torch.equal(back.codes, weight.codes)
    assert torch.equal(back.scale, weight.scale)
    short = {key: value[:-1] for key, value in tensors.items()}
    with pytest.raises(FormatError, match=rf"{MODULE.name}.weight_codes has shape"):
        TARGET.unpack(MODULE, INT8, short.__getitem__)


@pytest.mark.parametrize(
    ("module", "scheme", "words"),
    [
        (MODULE, Scheme(grid(3, 16)), "codes of 2, 4 and 8 bits, not 3"),
        (MODULE, Scheme(grid(4, 40)), "group_size 40 of .*: ONNX Runtime has blocks of 16 to 256 inputs; use 16"),
        (MODULE, Scheme(grid(4, None)), "group_size channel"),
        (spec(8, 80, "embedding"), Scheme(grid(4, 64)), "blocks of 64 do not divide the 80 columns of .*; use 16"),
        (spec(8, 20, "embedding"), Scheme(grid(4, 64)), "leave it dense"),
        (MODULE, Scheme(float_zero(4, 16)), "whole zero points only"),
        (MODULE, Scheme(grid(4, 16), ordered=True), "no group index"),
        (spec(8, 16, transposed=True), Scheme(grid(4, 16)), "Conv1D"),
        (MODULE, Scheme(activations=Activations()), "only together with the weight"),
        (MODULE, Scheme(grid(8, 16), activations=Activations()), "`group_size: channel`"),
        (MODULE, Scheme(grid(8, None), activations=Activations(bits=4)), "8-bit integer inputs"),
        (MODULE, Scheme(grid(8, None), activations=Activations(threshold=6.0)), "8-bit integer inputs"),
        (MODULE, Scheme(grid(8, None), activations=Activations(granularity="tensor")), "a scale per token"),
        (spec(8, 16, "embedding"), INT8, "only linears of the blocks"),
    ],
)
def test_what_it_cannot_hold(module, scheme, words):
    (problem,) = TARGET.problems(module, scheme)
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(problem)


@pytest.mark.parametrize("family", [*FAMILIES])
def test_models_without_a_graph_are_refused_by_name(family):
    config = {"model_type": FAMILIES[family]["model_type"]}
    refused = TARGET.refusals(layout_stub(config["model_type"]), config)
    assert bool(refused) == (family not in ("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3"))
    assert not refused or config["model_type"] in refused[0]


def layout_stub(model_type: str):
    from types import SimpleNamespace

    return SimpleNamespace(model_type=model_type)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("hidden_act", "gelu", "knows? silu"),
        ("rope_scaling", {"rope_type": "dynamic"}, "rotary embedding is 'dynamic'"),
    ],
)
def test_odd_models_are_refused(key, value, words):
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(TARGET.refusals(layout_stub("llama"), {key: value})[0])


def four(symmetric: bool = True, bits: int = 4, size: int = 32) -> Scheme:
    return Scheme(grid(bits, size, symmetric))


GRAPHS: dict[str, Case] = {
    "dense": Case("onnx", "llama", linear(Scheme())),
    "pruned": Case("onnx", "llama", linear(Scheme(sparsity=0.4))),
    "4 bits, tied embedding": Case("onnx", "llama", matrices(four()), True),
    "4 bits asymmetric, head": Case("onnx", "llama", matrices(four(False)), False),
    "8 bits asymmetric, dense tie": Case("onnx", "llama", linear(four(False, 8)), True),
    "2 bits": Case("onnx", "llama", linear(four(bits=2))),
    "blocks that do not divide": Case("onnx", "llama", linear(four(size=64))),
    "mixed": Case("onnx", "llama", of_kind({"linear": four(), "embedding": four(False, 8, 16)}), True),
    "sliding window": Case("onnx", "mistral", linear(four())),
    "biases": Case("onnx", "qwen2", linear(four())),
    "norms on both sides": Case("onnx", "gemma2", linear(four())),
    "norms on both sides, two rotary embeddings": Case("onnx", "gemma3", matrices(four())),
    "one linear for three": Case("onnx", "phi3", linear(four())),
    "norms of heads": Case("onnx", "qwen3", linear(four())),
    "integers": Case("onnx", "llama", linear(INT8)),
    "integers with biases": Case("onnx", "qwen2", linear(INT8), True),
}
TOKENS = torch.randint(3, 300, (2, 48), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def graphs(tiny_model, tmp_path_factory):
    folder, done = tmp_path_factory.mktemp("onnx"), {}
    for number, (name, case) in enumerate(GRAPHS.items()):
        item = write(case, tiny_model(case.family, tied=case.tied), folder / str(number))
        TARGET.write_beside(item.directory, layout_of(item.config), item.config)
        done[name] = item
    return done


def reference(item) -> torch.Tensor:
    """Logits of transformers with the decoded weights, multiplying integers where the graph does."""
    from transformers import AutoModelForCausalLM

    from penjing.runtime import runner_for

    model = AutoModelForCausalLM.from_pretrained(item.decoded)
    for module, scheme in item.schemes.items():
        if scheme.activations is not None:
            made = runner_for(model.get_submodule(module.name), scheme, item.weights[module.name])
            model.set_submodule(module.name, made)
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("name", GRAPHS)
def test_logits_are_those_of_transformers(name, graphs):
    expected = reference(graphs[name])
    found = session.logits(graphs[name].directory / GRAPH, TOKENS, exact=True)
    tolerance = 0.05 if "integers" in name else CLOSE  # an input between two codes may fall to either side
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance * float(expected.abs().max()))
    assert expected.std() > 0.1


@pytest.mark.parametrize("name", ["4 bits, tied embedding", "2 bits", "8 bits asymmetric, dense tie"])
def test_rounded_inputs_cost_little(name, graphs):
    expected = reference(graphs[name]).log_softmax(-1)
    found = session.logits(graphs[name].directory / GRAPH, TOKENS).log_softmax(-1)
    kl = (expected.exp() * (expected - found)).sum(-1).mean()
    assert 1e-6 < kl < 0.05


def run(opened, cache, ids: np.ndarray, mask: np.ndarray, **more: np.ndarray):
    names = [node.name for node in opened.get_outputs()]
    found = opened.run(names, {"input_ids": ids, "attention_mask": mask, **cache, **more})
    past = {name.replace("present", "past_key_values"): one for name, one in zip(names[1:], found[1:], strict=True)}
    return found[0], past


@pytest.mark.parametrize("name", ["mixed", "sliding window", "norms of heads"])
def test_prefill_and_decode_are_the_full_forward(name, graphs):
    opened = session.open_graph(graphs[name].directory / GRAPH, exact=True)
    ids, ones = TOKENS.numpy(), np.ones((2, 48), dtype=np.int64)
    full, _ = run(opened, session.empty_cache(opened, 2), ids, ones)
    for rows, pieces in ((2, ((0, 40), (40, 41), (41, 42))), (1, ((0, 30), (30, 37), (37, 38), (38, 48)))):
        cache, parts = session.empty_cache(opened, rows), []
        for begin, end in pieces:  # several tokens after cached ones: ONNX Runtime takes one sequence at a time
            part, cache = run(opened, cache, ids[:rows, begin:end], ones[:rows, :end])
            parts.append(part)
        found, expected = np.concatenate(parts, 1), full[:rows, : pieces[-1][1]]
        np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE * np.abs(full).max())


@pytest.mark.parametrize("name", ["mixed", "sliding window"])
def test_padding_on_the_left(name, graphs):
    """A short prompt beside a long one gives the logits it gives alone, in prefill and after."""
    opened = session.open_graph(graphs[name].directory / GRAPH, exact=True)
    ids, short = TOKENS.numpy().copy(), 21
    mask = np.ones((2, 48), dtype=np.int64)
    ids[0, : 48 - short], mask[0, : 48 - short] = 0, 0
    together, cache = run(opened, session.empty_cache(opened, 2), ids[:, :-1], mask[:, :-1])
    following, _ = run(opened, cache, ids[:, -1:], mask)
    alone, _ = run(opened, session.empty_cache(opened, 1), ids[:1, -short:], mask[:1, -short:])
    found = np.concatenate([together, following], 1)[:1, -short:]
    np.testing.assert_allclose(found, alone, rtol=0, atol=CLOSE * np.abs(alone).max())


def test_only_the_last_logits(graphs):
    opened = session.open_graph(graphs["mixed"].directory / GRAPH, exact=True)
    ids, ones, empty = TOKENS.numpy(), np.ones((2, 48), dtype=np.int64), session.empty_cache(opened, 2)
    full, _ = run(opened, empty, ids, ones)
    last, _ = run(opened, empty, ids, ones, num_logits_to_keep=np.array([3]))
    np.testing.assert_allclose(last, full[:, -3:], rtol=0, atol=CLOSE * np.abs(full).max())


def test_the_graph_holds_no_weights_and_fits_the_standard(graphs):
    import onnx

    directory = graphs["4 bits, tied embedding"].directory
    model = onnx.load(directory / GRAPH, load_external_data=False)
    inside = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    assert inside < 2 * 512 * 8 * 4 + 2000  # rotary angles of 512 positions
    stored = {
        entry.value for tensor in model.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    assert stored == {"model.safetensors"}
    loaded = onnx.load(directory / GRAPH)
    assert all(tensor.raw_data for tensor in loaded.graph.initializer)


def test_the_config_is_read_back(graphs):
    for item in graphs.values():
        assert format_of(item.config) is TARGET
        found = TARGET.schemes(item.config, tuple(item.schemes))
        expected = {m.name: s.grid for m, s in item.schemes.items() if s.grid is not None}
        assert {name: scheme.grid for name, scheme in found.items() if scheme.grid} == expected
    with pytest.raises(FormatError, match="version 2"):
        TARGET.schemes({"quantization_config": {"quant_method": "penjing-onnx", "version": 2, "schemes": []}}, ())


def test_missing_and_damaged_files_are_errors(graphs, tmp_path):
    with pytest.raises(FormatError, match="hold no tensor"):
        TARGET.write_beside(tmp_path, layout_of(graphs["dense"].config), graphs["dense"].config)
    (tmp_path / GRAPH).write_bytes((graphs["mixed"].directory / GRAPH).read_bytes())
    with pytest.raises(FormatError, match="ONNX Runtime cannot load it"):
        session.open_graph(tmp_path / GRAPH)
    (tmp_path / GRAPH).write_bytes(b"not a graph")
    with pytest.raises(FormatError, match="ONNX Runtime cannot load it"):
        session.open_graph(tmp_path / GRAPH)
