"""LLM-QAT: the model that is trained is the model that `rtn` exports; every family; training beats rounding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from penjing.errors import PlanError
from penjing.methods.quantization.llm_qat import LLMQATOptions, config_of, matrices, train
from penjing.methods.quantization.rounded_activations import round_cache
from penjing.methods.quantization.rtn import rtn
from penjing.methods.training import TrainTask
from penjing.numerics.grids import IntegerGrid
from penjing.training import Windows
from penjing.training import train as run
from tiny_models import FAMILIES, token_windows

pytest.importorskip("accelerate")


def load(directory: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(directory).eval().requires_grad_(False)


def prepared(model: Any, teacher: Any, **keys: Any) -> Any:
    options = LLMQATOptions(**{"text": "given", "inputs": 16, **keys})
    return train(TrainTask(model, lambda: teacher), options)


def export(model: Any, group_size: int | None, dtype: torch.dtype) -> Any:
    """Every matrix stored in `dtype`, then rounded to nearest, decoded."""
    grid = IntegerGrid(4, group_size, True, "narrow", dtype)
    for module, name in matrices(model):
        weight = module.get_parameter(name).data
        rows = weight.T if type(module).__name__ == "Conv1D" else weight
        file = rows.to(dtype).float()
        decoded = torch.stack(
            [rtn(part, grid).dense() for part in file.flatten(0, -3)] if file.ndim > 2 else [rtn(file, grid).dense()]
        )
        decoded = decoded.view(rows.shape)
        weight.copy_(decoded.T if rows is not weight else decoded)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_exported_is_what_was_trained(family, tiny_model):
    teacher, tokens = load(tiny_model(family)), token_windows(1, 12)
    model = load(tiny_model(family))
    training = prepared(model, teacher, group_size=20, learnt_ranges=family in ("llama", "gpt2"))
    wanted = model(tokens).logits
    assert not torch.allclose(wanted, teacher(tokens).logits, atol=0.1)
    exported = export(training.finish(), 20, torch.bfloat16)
    assert torch.allclose(exported(tokens).logits, wanted, atol=1e-4)
    assert {name for name, _ in exported.named_parameters()} == {name for name, _ in teacher.named_parameters()}


def test_inputs_and_cache_are_rounded_only_while_it_trains(tiny_model):
    teacher, tokens = load(tiny_model("llama")), token_windows(1, 12)
    model = copy.deepcopy(teacher)
    training = prepared(model, teacher, bits=8, inputs=4, kv=4)
    seen: dict[str, torch.Tensor] = {}
    layer = model.model.layers[0]
    with torch.no_grad():
        hook = layer.self_attn.o_proj.register_forward_hook(lambda module, args, output: seen.update(o=args[0]))
        rounded = model(tokens).logits
        hook.remove()
    assert all(len(token.unique()) <= 16 for token in (seen["o"][0] * 1e3).round())
    plain, dense = training.finish()(tokens).logits, teacher(tokens).logits
    assert (plain - dense).abs().mean() < 0.3 * (rounded - dense).abs().mean()


def test_a_token_has_one_range_for_all_heads(tiny_model):
    from penjing.models.attention import _WATCHER

    model = load(tiny_model("llama"))
    end = round_cache(model, 4)
    key = torch.randn(1, 2, 5, 16)
    watcher = getattr(model, _WATCHER)
    _, found, _ = watcher(0, key, key, key, 1.0)
    joined = key.transpose(1, 2).flatten(2)[0]
    step = joined.abs().amax(-1, keepdim=True) / 7
    wanted = ((joined / step).round() * step).view(5, 2, 16).transpose(0, 1)
    assert torch.allclose(found[0], wanted, atol=1e-6)
    end()
    assert not hasattr(model, _WATCHER)


@pytest.mark.parametrize("keys", [{}, {"learnt_ranges": True}, {"text": "generated", "pool": 4}], ids=str)
def test_training_lowers_the_divergence(keys, tiny_model, tmp_path):
    teacher = load(tiny_model("llama"))
    model = load(tiny_model("llama"))
    options = LLMQATOptions(
        **{
            "text": "given",
            "inputs": 8,
            "kv": 4,
            "bits": 4,
            "steps": 24,
            "batch_size": 4,
            "learning_rate": 3e-3,
            **keys,
        }
    )
    training = train(TrainTask(model, lambda: teacher), options)
    with torch.enable_grad():
        curve = run(training, Windows(token_windows(4, 16), 4, 4, 0), options, tmp_path, marks={})
    assert sum(curve.losses[-3:]) < 0.9 * sum(curve.losses[:3])


def test_experts_and_whole_matrices_are_refused(tiny_model):
    teacher = load(tiny_model("mixtral"))
    with pytest.raises(PlanError, match="a stack of experts"):
        prepared(load(tiny_model("mixtral")), teacher, inputs=8)
    with pytest.raises(ValueError, match="row by row"):
        LLMQATOptions(group_size="tensor")
    with pytest.raises(ValueError, match="set `storage: float32`"):
        config_of({"dtype": "float32"}, None, LLMQATOptions())


def test_pruned_weights_stay_zero(tiny_model, tmp_path):
    teacher, model = load(tiny_model("llama")), load(tiny_model("llama"))
    masks = {}
    for name, value in model.named_parameters():
        if "_proj" in name:
            masks[name] = value.abs() > value.abs().median()
            value.mul_(masks[name])
    options = LLMQATOptions(text="given", steps=3, batch_size=2, micro_batch=2, learning_rate=1e-2)
    training = train(TrainTask(model, lambda: teacher, masks), options)
    with torch.enable_grad():
        run(training, Windows(token_windows(4, 16), 2, 2, 0), options, tmp_path, marks={})
    finished = dict(training.finish().named_parameters())
    assert all((finished[name][~kept] == 0).all() for name, kept in masks.items())
