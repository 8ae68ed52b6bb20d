"""Recipes whose result an engine of its own runs, from the dense model to the verified directory and on."""

from __future__ import annotations

from typing import Any

import pytest

from penjing import api
from penjing.errors import PlanError, VerificationError
from runs import compress, recipe, texts

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

Step = dict[str, Any]


def step(method: str = "rtn", bits: int = 4, size: int | str = 32, **keys: Any) -> Step:
    return {"method": method, "bits": bits, "group_size": size, **keys}


EMBEDDING = step(bits=8, targets=["embedding", "lm_head"])
STATIC = {"dynamic": False}
CASES: dict[str, tuple[str, str, list[Step]]] = {
    "onnx": ("onnx", "llama", [step("gptq"), EMBEDDING]),
    "onnx awq": ("onnx", "qwen3", [step("awq", symmetric=False, steps=2)]),
    "onnx, fewer blocks": ("onnx", "llama", [{"method": "shortgpt", "drop": 1}, step()]),
    "onnx, smoothed int8": ("onnx", "llama", [{"method": "smoothquant"}, step(bits=8, size="channel", activations={})]),
    "onnx, static int8": ("onnx", "qwen2", [step(bits=8, size="channel", activations=STATIC)]),
    "onnx, static int8 with zero points": (
        "onnx",
        "llama",
        [step(bits=8, size="channel", activations=STATIC | {"symmetric": False})],
    ),
    "onnx, gemma": ("onnx", "gemma3", [step("gptq")]),
    "onnx, rotated": ("onnx", "mistral", [{"method": "rotation"}, step()]),
    "gptq": ("gptq", "llama", [step("gptq")]),
    "gptq, scattered groups": ("gptq", "qwen2", [step("gptq", static_groups=False)]),
    "gptq, some linears": ("gptq", "llama", [step("gptq", targets=["*.mlp.*"])]),
    "gptq-v2": ("gptq-v2", "gpt_neox", [step("gptq", symmetric=False, size="channel")]),
    "awq": ("awq", "mistral", [step("awq", symmetric=False, steps=2)]),
}


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return texts(tmp_path_factory.mktemp("texts"))


@pytest.mark.parametrize("name", CASES)
def test_written_verified_and_read_again(name: str, tiny_model, short, tmp_path) -> None:
    format, family, steps = CASES[name]
    output, model = tmp_path / "out", tiny_model(family)
    report = compress(model, recipe(short, *steps, format=format, dtype="float16"), output, engine=True)
    assert report.verification["how"] == ("onnxruntime" if format == "onnx" else "streamed")
    assert report.predicted_bytes == sum(row.bytes for row in report.modules)
    assert report.quality is not None and report.quality.kl is not None and report.quality.kl > 0
    measured = api.evaluate(output, against=model, **short["evaluation"])
    assert measured.quality.kl == pytest.approx(report.quality.kl, rel=1e-5)


def test_a_graph_that_was_changed_is_noticed(tiny_model, short, tmp_path) -> None:
    import onnx

    compress(tiny_model("llama"), recipe(short, step(), format="onnx"), tmp_path / "out")
    file = tmp_path / "out" / "model.onnx"
    graph = onnx.load(file, load_external_data=False)
    file.write_bytes(graph.SerializeToString()[:-4])
    with pytest.raises(VerificationError, match="was changed"):
        api.verify(tmp_path / "out")


@pytest.mark.parametrize(
    ("format", "family", "wanted", "words"),
    [
        ("onnx", "gpt2", step(), "graphs for llama, .*, not for gpt2"),
        ("onnx", "llama", step(bits=3), "codes of 2, 4 and 8 bits, not 3"),
        ("onnx", "llama", step(size=24), "use 16, 32, 64"),
        ("gptq", "llama", step(symmetric=False), "use format gptq-v2"),
        ("awq", "llama", step(bits=8), "codes of 4 bits, not 8"),
        ("gptq", "llama", step(targets=["q_proj"]), "need the same scheme"),
    ],
)
def test_what_does_not_fit_is_refused_before_work_starts(format, family, wanted, words, tiny_model, short) -> None:
    with pytest.raises(PlanError, match=words):
        api.plan(tiny_model(family), recipe(short, wanted, format=format))


def test_graphs_are_found_by_the_engine_and_exported(tiny_model, short, tmp_path) -> None:
    from penjing.engines.table import engine_for

    compress(tiny_model("llama"), recipe(short, step(bits=4), format="native"), tmp_path / "other")
    compress(tiny_model("llama"), recipe(short, step(bits=8), format="onnx"), tmp_path / "out")
    assert engine_for(tmp_path / "out").name == "onnxruntime"
    assert engine_for(tmp_path / "other").name == "transformers"
    for target, engine in (("onnx", "onnxruntime"), ("gptq", "streamed"), ("awq", "streamed")):
        exported = api.export(tmp_path / "other", target, tmp_path / target)
        assert exported.verified == engine and exported.difference < 1e-4
