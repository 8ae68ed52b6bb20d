"""Adapters: what PEFT computes with them is what Penjing merges, and taking them out leaves no trace."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from penjing.errors import CheckpointError, FormatError
from penjing.training.adapters import AdapterOptions, Adapters, decoded, load_base, train_adapter
from penjing.training.peft_files import read_adapter
from runs import compress, recipe, texts
from tiny_models import token_windows

peft = pytest.importorskip("peft")

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "rslora": {"rank_stabilised": True, "dropout": 0.1},
    "dora": {"magnitudes": True},
}


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> AdapterOptions:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = [{"prompt": f"Say {word}", "response": f"{word} it is"} for word in ("pine", "pot", "moss", "wire")]
    path.write_text("\n".join(map(json.dumps, rows)))
    return AdapterOptions(data=str(path), length=64, steps=3, batch_size=2, rank=4, learning_rate=1e-2)


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(token_windows(2, 24), use_cache=False).logits


@pytest.mark.parametrize(("family", "kind"), [*(("llama", kind) for kind in KINDS), ("gpt2", "lora")])
def test_peft_and_the_merged_weights_agree(family, kind, options, tiny_model, tmp_path):
    model = tiny_model(family)
    wanted = options.model_copy(update=KINDS[kind])
    curve = train_adapter(model, tmp_path / "adapter", wanted)
    assert curve.losses[-1] < curve.losses[0]
    beside = peft.PeftModel.from_pretrained(load_base(model), tmp_path / "adapter")
    expected = logits(beside)
    base = load_base(model)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    untouched = logits(base)
    adapters = Adapters(base)
    adapters.add("one", tmp_path / "adapter")
    adapters.use("one")
    torch.testing.assert_close(logits(base), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(expected, untouched, atol=1e-3)
    adapters.use()
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


def test_several_on_one_model(options, tiny_model, tmp_path):
    model = tiny_model("llama")
    for seed in (0, 1):
        train_adapter(model, tmp_path / str(seed), options.model_copy(update={"seed": seed}))
    base = load_base(model)
    adapters = Adapters(base)
    for seed in ("0", "1"):
        adapters.add(seed, tmp_path / seed)
    seen = {}
    for names in (("0",), ("1",), ("0", "1"), ("0",)):
        adapters.use(*names)
        assert torch.equal(seen.setdefault(names, logits(base)), logits(base))
    assert not torch.equal(seen["0",], seen["1",]) and not torch.equal(seen["0", "1"], seen["1",])


def test_pruned_weights_stay_pruned(options, tiny_model, tmp_path):
    model = tiny_model("llama")
    train_adapter(model, tmp_path / "adapter", options)
    base = load_base(model)
    weight = base.get_parameter("model.layers.0.mlp.up_proj.weight")
    weight.data.mul_(weight.abs() > weight.abs().median())
    zeros = weight == 0
    adapters = Adapters(base)
    adapters.add("one", tmp_path / "adapter")
    adapters.use("one")
    assert torch.equal(weight == 0, zeros)


def test_a_killed_adapter_goes_on(options, tiny_model, tmp_path):
    def kill(stage: str, done: int, total: int, detail: str) -> None:
        if done == 2:
            raise KeyboardInterrupt

    model, often = tiny_model("llama"), options.model_copy(update={"save_every": 1, "dropout": 0.2})
    train_adapter(model, tmp_path / "whole", often)
    with pytest.raises(KeyboardInterrupt):
        train_adapter(model, tmp_path / "killed", often, progress=kill)
    train_adapter(model, tmp_path / "killed", often)
    whole, killed = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(value, killed[name]) for name, value in whole.items())


@pytest.fixture
def nf4(tiny_model, tmp_path) -> Path:
    pytest.importorskip("bitsandbytes")
    step = {"method": "rtn", "type": "nf4", "group_size": 64, "double_quant": True}
    short = texts(tmp_path / "texts")
    compress(
        tiny_model("llama", inner=128), recipe(short, step, format="bitsandbytes"), tmp_path / "nf4", evaluated=False
    )
    return tmp_path / "nf4"


def test_qlora(options, nf4, tiny_model, tmp_path):
    """The base's codes stay; an adapter that starts from what rounding lost starts closer to the dense model."""
    before = load_file(next(nf4.glob("*.safetensors")))
    curve = train_adapter(nf4, tmp_path / "adapter", options)
    assert curve.losses[-1] < curve.losses[0]
    after = load_file(next(nf4.glob("*.safetensors")))
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    beside = peft.PeftModel.from_pretrained(load_base(nf4), tmp_path / "adapter")
    assert logits(beside).isfinite().all()
    with pytest.raises(FormatError, match="holds codes"):
        Adapters(load_base(nf4)).add("one", tmp_path / "adapter")


def test_an_adapter_absorbs_what_rounding_lost(options, nf4, tiny_model, tmp_path):
    dense = tiny_model("llama", inner=128)
    still = options.model_copy(update={"start": "residual", "steps": 1, "learning_rate": 1e-12, "rank": 16})
    train_adapter(nf4, tmp_path / "adapter", still, dense=dense)
    wanted, rounded = load_base(dense), load_base(nf4)
    name = "model.layers.0.mlp.up_proj"
    lost = wanted.get_parameter(f"{name}.weight") - decoded(rounded.get_submodule(name))
    files = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    down, up = (files[f"base_model.model.{name}.lora_{part}.weight"] for part in "AB")
    left = lost - 2.0 * up @ down
    values = torch.linalg.svdvals(lost)
    assert float(left.norm()) == pytest.approx(float(values[16:].norm()), rel=1e-2)
    with pytest.raises(CheckpointError, match="dense model"):
        train_adapter(nf4, tmp_path / "none", still)


@pytest.mark.parametrize(
    ("entries", "told"), [({"peft_type": "IA3"}, "IA3"), ({"bias": "all"}, "more than two matrices")]
)
def test_other_adapters_are_refused(entries, told, options, tiny_model, tmp_path):
    train_adapter(tiny_model("llama"), tmp_path, options.model_copy(update={"steps": 1}))
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    with pytest.raises(CheckpointError, match=told):
        Adapters(load_base(tiny_model("llama"))).add("one", tmp_path)
    with pytest.raises(CheckpointError, match="not an adapter"):
        Adapters(load_base(tiny_model("llama"))).add("one", tmp_path / "nowhere")


def test_a_damaged_adapter_is_named(options, tiny_model, tmp_path):
    train_adapter(tiny_model("llama"), tmp_path, options.model_copy(update={"steps": 1}))
    file = tmp_path / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors: .*download it again"):
        read_adapter(tmp_path)
