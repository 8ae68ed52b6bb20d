"""Steps that remove units, end to end on tiny models: what stays, what is refused, what a refit is worth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from penjing import api
from penjing.checkpoint import open_checkpoint
from penjing.errors import PlanError, RecipeError
from penjing.methods.pruning.refit import refit as refit_of
from penjing.methods.pruning.unit_scores import SCORES
from penjing.models import layout_of
from penjing.models.couplings import find_couplings
from penjing.models.narrowing import narrow_stream, norm_factor
from penjing.pipeline.block_cut import BlockWeights
from penjing.pipeline.stream import StreamedModel
from penjing.pipeline.text import TextSource
from penjing.pipeline.unit_gradients import gradient_scores
from penjing.pipeline.walk import score_blocks
from penjing.pipeline.weights import Weights
from penjing.recipe import Calibration
from penjing.statistics import CosineChange
from runs import compress, recipe, texts
from tiny_models import token_windows


@pytest.fixture
def short(tmp_path: Path) -> dict[str, Any]:
    return texts(tmp_path / "texts")


def tensors(directory: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(directory)
    return {name: checkpoint.load(name) for name in checkpoint.specs()}


def plan(model: Path, short: dict[str, Any], *steps: dict[str, Any], **keys: Any) -> Any:
    return api.plan(model, recipe(short, *steps, format="dense", **keys))


def test_the_largest_weights_stay_and_are_the_originals(tiny_model, short, tmp_path) -> None:
    model = tiny_model("llama", seed=5)
    step = {"method": "neurons", "sparsity": 0.25, "score": "magnitude", "refit": False}
    report = compress(model, recipe(short, step, format="dense"), tmp_path / "out")
    assert report.made[0]["kept"] == {"neurons": [72, 96]}
    before, after = tensors(model), tensors(tmp_path / "out")
    for index in range(2):
        names = [f"model.layers.{index}.mlp.{name}.weight" for name in ("gate_proj", "up_proj", "down_proj")]
        gate, up, down = (before[name].double() for name in names)
        norms = gate.square().sum(1) + up.square().sum(1) + down.square().sum(0)
        kept = norms.argsort(descending=True)[:72].sort().values
        for name, side in zip(names, (0, 0, 1), strict=True):
            assert torch.equal(after[name], before[name].index_select(side, kept))


def test_the_refit_is_least_squares_over_the_calibration_text(tiny_model, short, tmp_path) -> None:
    """`down_proj` of the first block, from inputs that transformers shows."""
    from transformers import AutoModelForCausalLM

    model = tiny_model("llama")
    step = {"method": "neurons", "sparsity": 0.25, "score": "magnitude"}
    for refit, name in ((False, "kept"), (True, "refitted")):
        wanted = recipe(short, step | {"refit": refit}, format="dense")
        compress(model, wanted, tmp_path / name, evaluated=False)
    down = "model.layers.0.mlp.down_proj.weight"
    before, kept, found = (tensors(path)[down] for path in (model, tmp_path / "kept", tmp_path / "refitted"))
    units = torch.tensor([int((before - column[:, None]).abs().sum(0).argmin()) for column in kept.T])
    inputs: list[Tensor] = []
    live = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    live.model.layers[0].mlp.down_proj.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    text = TextSource(open_checkpoint(model)).calibration(Calibration(**short["calibration"]))
    with torch.no_grad():
        live(text.tokens)
    seen = inputs[0].flatten(0, 1)
    torch.testing.assert_close(found, refit_of(before, seen.T @ seen, units), rtol=1e-3, atol=1e-4)
    assert not torch.equal(found, kept)


@pytest.mark.parametrize("score", ["gradient", "taylor-mixed"])
def test_gradients_are_those_of_the_whole_model(score: str, tiny_model) -> None:
    """Scores from one block at a time, against autograd through the model as transformers runs it."""
    from transformers import AutoModelForCausalLM

    directory = tiny_model("llama")
    checkpoint, tokens = open_checkpoint(directory), token_windows(3, 16)
    layout = layout_of(checkpoint.config)
    couplings = find_couplings(checkpoint.config, layout)
    stream = StreamedModel(checkpoint.config, layout, Weights(checkpoint, layout).live)
    weights = [
        BlockWeights(layout.of_block(index), f"{layout.block_name(index)}.", checkpoint.load) for index in range(2)
    ]
    chosen = [[(coupling, 1) for coupling in block.found] for block in couplings]
    found = gradient_scores(stream, tokens, chosen, weights, SCORES[score], lambda *said: None)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    names = [f"model.layers.1.mlp.{name}.weight" for name in ("down_proj", "gate_proj", "up_proj")]
    leaves = [model.get_parameter(name) for name in names]
    parts = [torch.autograd.grad(model(row[None], labels=row[None]).loss, leaves) for row in tokens]
    if score == "gradient":
        expected = torch.stack([(part[0] * leaves[0]).sum(0).abs() for part in parts]).mean(0)
    else:
        expected = torch.zeros(96)
        for number, leaf in enumerate(leaves):
            mean = torch.stack([part[number] for part in parts]).mean(0)
            square = torch.stack([part[number].square() for part in parts]).mean(0)
            change = (leaf * mean - 0.5 * leaf.square() * square).abs()
            expected += change.sum(1 if number else 0)
    torch.testing.assert_close(found[1]["mlp.down_proj"].float(), expected.detach(), rtol=1e-3, atol=1e-7)


def test_heads_by_entropy(tiny_model, short, tmp_path) -> None:
    step = {"method": "heads", "sparsity": 0.5, "score": "entropy"}
    report = compress(tiny_model("phi3"), recipe(short, step, format="dense"), tmp_path / "out", evaluated=False)
    assert report.made[0]["kept"] == {"heads": [1, 2]}


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "mixtral"])
def test_masked_channels_are_removed_channels(family: str, tiny_model, short, tmp_path) -> None:
    """The narrow model computes what the wide one does with zeros in the channels that went."""
    model = tiny_model(family, tied=family == "gemma2") if family in ("gemma2", "gemma3") else tiny_model(family)
    step = {"method": "channels", "sparsity": 0.25, "basis": "own"}
    compress(model, recipe(short, step, format="dense"), tmp_path / "out", evaluated=False)
    before, after = tensors(model), tensors(tmp_path / "out")
    layout, narrow = (layout_of(open_checkpoint(path).config) for path in (model, tmp_path / "out"))
    wide, thin = (table[f"{layout.embedding.name}.weight"] for table in (before, after))
    factor = norm_factor(layout, narrow) if layout.scaled else 1.0
    kept = torch.tensor([int((wide * factor - column[:, None]).abs().sum(0).argmin()) for column in thin.T])
    assert kept.tolist() == sorted(set(kept.tolist())) and len(kept) == 48
    gone = torch.ones(64, dtype=torch.bool).index_fill_(0, kept, False)
    masked = dict(before)
    for module in layout.modules:
        for key in module.tensors:
            name = f"{module.name}.{key}"
            if module.kind == "embedding":
                masked[name] = before[name].clone()
                masked[name][:, gone] = 0
            elif module.name.endswith(("o_proj", "down_proj", ".w2")):
                masked[name] = before[name].clone()
                masked[name][gone] = 0
    expected = masked_logits(model, masked, tmp_path / "masked")
    torch.testing.assert_close(
        masked_logits(tmp_path / "out", after, tmp_path / "again"), expected, rtol=2e-4, atol=2e-4
    )


def masked_logits(model: Path, given: dict[str, Tensor], folder: Path) -> Tensor:
    """Logits of a model with other tensors, written the way a checkpoint is."""
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM

    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in given.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text((model / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    with torch.no_grad():
        return loaded(token_windows(2, 24), use_cache=False).logits


def test_all_principal_channels_are_the_whole_model(tiny_model) -> None:
    config = open_checkpoint(tiny_model("llama")).config
    layout = layout_of(config)
    assert narrow_stream(config, layout, 64).layout == layout


def test_params_are_met_to_within_one_unit(tiny_model, short) -> None:
    model = tiny_model("llama")
    whole = plan(model, short, {"method": "neurons", "sparsity": 0}).layout.parameters
    target = whole - 10_000
    found = plan(model, short, {"method": "neurons", "params": target}).layout.parameters
    one = 2 * 3 * 64
    assert target - one < found <= target
    both = plan(model, short, {"method": "llm-pruner", "params": f"{target / 1000:.3f}K"}).layout.parameters
    assert both <= target


def test_the_last_block_is_measured_before_the_final_norm(tiny_model) -> None:
    """The last of transformers' hidden states has passed the final norm; influence must not be taken from it."""
    from transformers import AutoModelForCausalLM

    checkpoint, tokens = open_checkpoint(tiny_model("llama")), token_windows(2, 24)
    layout = layout_of(checkpoint.config)
    found = score_blocks(checkpoint, layout, tokens, CosineChange, dtype=torch.float32, progress=lambda *said: None)
    live = AutoModelForCausalLM.from_pretrained(checkpoint.path, dtype=torch.float32).eval()
    outputs: list[Tensor] = []
    live.model.layers[1].register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        states = live(tokens, output_hidden_states=True, use_cache=False).hidden_states
    change = [1 - torch.cosine_similarity(states[1], after, dim=-1).mean() for after in (outputs[0], states[2])]
    assert float(found[1]) == pytest.approx(float(change[0]), rel=1e-4)
    assert abs(float(change[1]) - float(change[0])) > 1e-3


def test_flap_adds_a_bias_where_a_config_can_have_one(tiny_model, short, tmp_path) -> None:
    step = {"method": "flap", "sparsity": 0.25, "heads": False}
    compress(tiny_model("llama"), recipe(short, step, format="dense"), tmp_path / "out", evaluated=False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["mlp_bias"] is True and config["intermediate_size"] == 72
    after = tensors(tmp_path / "out")
    assert after["model.layers.0.mlp.down_proj.bias"].abs().max() > 0
    assert not after["model.layers.0.mlp.up_proj.bias"].any()


def test_replaceme_is_better_than_plain_removal_where_there_is_text_enough(tiny_model, short, tmp_path) -> None:
    model = tiny_model("gpt_neox", layers=4)
    short["calibration"]["samples"] = 16
    plain = compress(model, recipe(short, {"method": "angular-layers", "drop": 2}, format="dense"), tmp_path / "a")
    bridged = compress(model, recipe(short, {"method": "replaceme", "drop": 2}, format="dense"), tmp_path / "b")
    assert plain.quality is not None and bridged.quality is not None
    assert bridged.quality.kl < plain.quality.kl


@pytest.mark.parametrize(
    ("family", "step", "message"),
    [
        ("gpt2", {"method": "heads", "sparsity": 0.5}, r"c_attn.weight would have shape \[64, 96\]"),
        ("gpt2", {"method": "channels", "sparsity": 0.5}, "its heads are a fixed fraction"),
        ("gemma2", {"method": "channels", "sparsity": 0.5}, "use `basis: own`"),
        ("gemma2", {"method": "replaceme", "drop": 1}, "mlp.down_proj.weight: a norm stands between"),
        ("mistral", {"method": "flap", "sparsity": 0.5}, "has no bias and config.json cannot give it one"),
        ("llama", {"method": "neurons", "params": "10"}, "cannot be reached by removing neurons alone"),
        ("llama", {"method": "angular-layers", "drop": 2}, "leaves none of 2 blocks"),
        ("llama", {"method": "shortgpt", "drop": 1, "protect_last": 2}, "leave none of 2 blocks to change"),
        ("llama", {"method": "greedy-layers", "drop": 1, "protect_first": 2}, "leave none of 2 blocks to change"),
        ("llama", {"method": "replaceme", "drop": 1, "protect_last": 1}, "leave none of 2 blocks to change"),
        ("llama", {"method": "channels", "params": "10"}, "cannot be reached by removing channels alone"),
    ],
)
def test_what_cannot_be_is_refused_at_plan_time(family, step, message, tiny_model, short) -> None:
    with pytest.raises(PlanError, match=message):
        plan(tiny_model(family), short, step)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"sparsity": 1.0}, "less than 1"),
        ({"sparsity": -0.1}, "greater than or equal to 0"),
        ({}, "give exactly one of `sparsity`"),
        ({"sparsity": 0.5, "params": "1M"}, "give exactly one of `sparsity`"),
        ({"params": "many"}, "is not a number of parameters"),
    ],
)
def test_bad_amounts(step, message, tiny_model, short) -> None:
    with pytest.raises(RecipeError, match=message):
        plan(tiny_model("llama"), short, {"method": "neurons", **step})


def test_a_width_that_breaks_a_later_group_is_refused_before_the_cut(tiny_model, short) -> None:
    gptq = {"method": "gptq", "group_size": 32}
    steps = [{"method": "neurons", "sparsity": 0.1}, gptq]
    with pytest.raises(PlanError, match="87"):
        api.plan(tiny_model("llama"), recipe(short, *steps, format="compressed-tensors"))
    steps[0]["multiple"] = 32
    found = api.plan(tiny_model("llama"), recipe(short, *steps, format="compressed-tensors"))
    assert found.layout.by_name["model.layers.0.mlp.down_proj"].shape == (64, 96)


CONFIG_ONLY = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 300}


@pytest.mark.parametrize(
    ("config", "method", "message"),
    [
        (
            {"model_type": "llama", "num_key_value_heads": 3, "intermediate_size": 96},
            "heads",
            "4 attention heads do not divide into groups for 3 key-value heads",
        ),
        ({"model_type": "mamba"}, "neurons", r"backbone.layers.\*.mixer \(it holds A_log, D\) on one token failed"),
        (
            {"model_type": "granitemoe", "num_local_experts": 4, "intermediate_size": 96},
            "neurons",
            "layers.0.block_sparse_moe.experts.gate_up_proj is a stack of matrices",
        ),
    ],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else None,
)
def test_what_is_not_known_to_be_coupled_is_named(config, method, message, short, tmp_path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_ONLY | config))
    with pytest.raises(PlanError, match=message):
        plan(tmp_path, short, {"method": method, "sparsity": 0.5})


def test_multiples_are_of_the_width_of_all_heads(tiny_model, short) -> None:
    step = {"method": "llm-pruner", "sparsity": 0.5, "multiple": 16}
    found = plan(tiny_model("llama"), short, step).layout
    assert found.by_name["model.layers.0.self_attn.o_proj"].shape == (64, 32)
    assert found.by_name["model.layers.0.mlp.down_proj"].shape == (64, 48)


@pytest.mark.parametrize(
    "step",
    [
        {"method": "heads", "sparsity": 0.4},
        {"method": "neurons", "sparsity": 0.1, "multiple": 32},
        {"method": "neurons", "sparsity": 0.5, "multiple": 1000},
    ],
)
def test_a_plan_says_so_when_nothing_goes(step, tiny_model, short) -> None:
    said = plan(tiny_model("llama"), short, step).warnings
    assert any(f"step 1 ({step['method']}) removes nothing" in line for line in said)
