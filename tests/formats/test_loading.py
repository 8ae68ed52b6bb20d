"""Every format in a fresh process that only calls `from_pretrained`: same weights and logits, nothing left over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from format_cases import CASES, Written, write
from penjing.formats import FORMATS, format_of
from penjing.formats.base import codes_of
from penjing.numerics.activations import round_inputs
from penjing.numerics.float_grids import FloatGrid
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Dense, Masked, Representation, Scheme
from penjing.runtime import runner_for

pytest.importorskip("compressed_tensors")
pytest.importorskip("bitsandbytes")


@pytest.fixture(scope="module")
def written(tiny_model, tmp_path_factory) -> dict[str, Written]:
    folder = tmp_path_factory.mktemp("formats")
    return {
        name: write(case, tiny_model(case.family, tied=case.tied), folder / str(number))
        for number, (name, case) in enumerate(CASES.items())
    }


@pytest.fixture(scope="module")
def loaded(written, tmp_path_factory) -> dict[str, dict]:
    """Case -> what the fresh process found. The native format is the only one that needs penjing there."""
    found = {}
    for needs_penjing in (False, True):
        names = [name for name, item in written.items() if (item.case.format == "native") == needs_penjing]
        output = tmp_path_factory.mktemp("loaded")
        jobs = output / "jobs.json"
        jobs.write_text(json.dumps([str(written[name].directory) for name in names]))
        modules = ["penjing.transformers_hook"] if needs_penjing else []
        command = [sys.executable, str(Path(__file__).with_name("load_all.py")), str(jobs), str(output), *modules]
        subprocess.run(command, check=True, capture_output=True, env=os.environ)
        report = json.loads((output / "report.json").read_text())
        assert report["imported"] == needs_penjing
        for number, name in enumerate(names):
            found[name] = {"report": report["reports"][number], "file": output / f"{number}.safetensors"}
    return found


def reference(item: Written) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Weights and logits of a plain model that holds the decoded weights, or multiplies integers where it can."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(item.decoded)
    for module, scheme in item.schemes.items():
        if scheme.activations is not None:
            live = model.get_submodule(module.name)
            how = scheme.activations
            made = runner_for(live, scheme, item.weights[module.name]) if item.case.format == "native" else None
            if made is None:
                live.register_forward_pre_hook(lambda _, given, how=how: (round_inputs(given[0], how), *given[1:]))
            else:
                model.set_submodule(module.name, made)
    with torch.no_grad():
        return model.state_dict(), model(torch.arange(3, 43).reshape(2, 20), use_cache=False).logits


@pytest.mark.parametrize("name", CASES)
def test_loads_in_a_fresh_process(name, written, loaded):
    assert loaded[name]["report"] == {}, loaded[name]["report"]
    stored = load_file(loaded[name]["file"])
    weights, logits = reference(written[name])
    for key, value in weights.items():
        packed = written[name].case.format == "bitsandbytes" and stored[key].dtype == torch.uint8
        assert packed or torch.equal(stored[key], value), key
    # the weights are the same bits; only the order of additions may differ between two processes
    torch.testing.assert_close(stored["logits"], logits, rtol=1e-5, atol=1e-5)
    assert logits.std() > 0.1


def declared(scheme: Scheme, target: str) -> Scheme:
    """What the config of a format can tell of a scheme."""
    if target == "native" or scheme.grid is None:
        return scheme
    if isinstance(scheme.grid, FloatGrid):
        return Scheme(scheme.grid, activations=scheme.activations)
    plain = IntegerGrid(scheme.grid.bits, scheme.grid.group_size, scheme.grid.symmetric, scale_dtype=torch.float32)
    return Scheme(plain, activations=scheme.activations)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.format != "dense"])
def test_reads_its_own_config_and_tensors(name, written):
    item = written[name]
    config = {**item.config, "dtype": "float32"}
    target = format_of(config) if "quantization_config" in config else FORMATS[item.case.format]
    modules = tuple(item.schemes)
    found = target.schemes(config, modules) if "quantization_config" in config else {}
    expected = {
        module.name: declared(scheme, target.name) for module, scheme in item.schemes.items() if not scheme.dense
    }
    told = {key: scheme for key, scheme in expected.items() if target.name == "native" or scheme.grid is not None}
    assert found == told
    tensors = load_file(item.directory / "model.safetensors")
    used = set()

    def load(key: str) -> torch.Tensor:
        used.add(key)
        return tensors[key]

    for module in modules:
        if module.name in expected:
            back = target.unpack(module, found.get(module.name, Scheme()), load)
            weight = item.weights[module.name]
            assert_same(back, weight if target.name == "native" else codes_of(weight) or Dense(weight.dense()))
    packed = {key for key in tensors if any(key.startswith(f"{name}.weight") for name in expected)}
    assert used == packed


def assert_same(back: Representation, weight: Representation) -> None:
    """Codes, scales, zero points, mask: all the same, not only what they decode to."""
    assert type(back) is type(weight)
    if isinstance(weight, Dense):
        assert torch.equal(back.values, weight.values)
    elif isinstance(weight, Masked):
        assert torch.equal(back.kept, weight.kept)
        assert torch.equal(back.dense(), weight.dense())
    else:
        assert torch.equal(back.codes, weight.codes)
        assert torch.equal(back.scale, weight.scale)
        assert (back.zero_point is None) == (weight.zero_point is None)
        assert back.zero_point is None or torch.equal(back.zero_point, weight.zero_point)
        assert (back.group_index is None) == (weight.group_index is None)
        assert back.group_index is None or torch.equal(back.group_index, weight.group_index)


def test_every_format_is_covered():
    assert {case.format for case in CASES.values()} == set(FORMATS) - {"gptq", "gptq-v2", "awq", "gguf", "onnx"}
