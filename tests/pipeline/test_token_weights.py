"""How much tokens count, against autograd on the whole model; and what walks make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import naive
from penjing import costs
from penjing.checkpoint import open_checkpoint
from penjing.models import layout_of
from penjing.pipeline.stream import StreamedModel
from penjing.pipeline.token_weights import LARGEST, LEAST, token_weights
from penjing.pipeline.weights import Weights
from runs import compress, recipe, shards, texts
from tiny_models import token_windows

TOKENS = token_windows(5, 24)
GPTQ = {"method": "gptq", "bits": 3, "group_size": 32}


def silent(*_: object) -> None:
    pass


def weighed(directory: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, dict[str, torch.Tensor]]:
    checkpoint = open_checkpoint(directory)
    layout = layout_of(checkpoint.config, checkpoint.specs())
    stream = StreamedModel(checkpoint.config, layout, Weights(checkpoint, layout).live)
    linears = layout.inside_blocks(module.name for module in layout.modules if module.kind == "linear")
    return layout, token_weights(stream, TOKENS, linears, dtype, silent)


def expected(directory: Path, clusters: list[list[str]], sizes: list[int]) -> dict[str, torch.Tensor]:
    """Shares of squared gradients, from the whole model in one piece; windows go in parts of `sizes`."""
    model, outputs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval(), {}
    for name in (name for cluster in clusters for name in cluster):
        model.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: outputs.update({name: output})
        )
    squares: dict[str, list[torch.Tensor]] = {}
    for seed, part in enumerate(TOKENS.split(sizes)):
        generator = torch.Generator().manual_seed(seed)
        for window in part:
            logits = model(window[None]).logits[0]
            labels = naive.drawn_from(logits.softmax(1), generator)
            chosen = logits.log_softmax(1).gather(1, labels).sum()
            found = dict(zip(outputs, torch.autograd.grad(chosen, list(outputs.values())), strict=True))
            for cluster in clusters:
                total = sum(found[name][0].double().square().sum(1) for name in cluster)
                for name in cluster:
                    squares.setdefault(name, []).append(total)
    weights = {}
    for name, parts in squares.items():
        tokens = torch.cat(parts)
        cut = (tokens / tokens.mean()).clamp(max=LARGEST) + LEAST
        weights[name] = (cut / cut.mean()).float()
    return weights


@pytest.mark.parametrize("sizes", [[5], [2, 2, 1]])
def test_weights_are_shares_of_squared_gradients(
    sizes: list[int], tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_model("llama")
    monkeypatch.setattr("penjing.pipeline.token_weights.windows_at_once", lambda *_: sizes[0])
    layout, found = weighed(directory)
    blocks = [f"{layout.block_name(index)}." for index in range(layout.blocks)]
    together = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["mlp.gate_proj", "mlp.up_proj"]]
    alone = [["self_attn.o_proj"], ["mlp.down_proj"]]
    clusters = [[block + name for name in cluster] for block in blocks for cluster in together + alone]
    wanted = expected(directory, clusters, sizes)
    assert found.keys() == wanted.keys()
    for name, weights in wanted.items():
        torch.testing.assert_close(found[name], weights, rtol=5e-3, atol=1e-5)
        assert float(found[name].mean()) == pytest.approx(1, abs=1e-5)


def test_experts_get_no_weights_and_the_rest_does(tiny_model: Any) -> None:
    _, found = weighed(tiny_model("mixtral"))
    assert found
    assert not [name for name in found if ".experts." in name]


def test_windows_at_once_fit_the_limit_or_take_what_the_states_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "INPUTS_AT_ONCE", 1000)
    assert costs.windows_at_once(windows=3, of_window=10, blocks=20) == 3  # 600 bytes, all of them
    assert costs.windows_at_once(windows=50, of_window=10, blocks=20) == 5  # 5 x 10 x 20 = 1000
    assert costs.windows_at_once(windows=400, of_window=10, blocks=20) == 20  # as much as all states: 4000
    assert costs.windows_at_once(windows=2, of_window=5000, blocks=20) == 1


def test_a_recipe_that_weighs_tokens_gives_other_codes_each_time_the_same(tmp_path: Path, tiny_model: Any) -> None:
    model, short = tiny_model("llama"), texts(tmp_path / "texts")
    made = {}
    for name, how in {"alike": "alike", "gradient": "gradient", "again": "gradient"}.items():
        calibration = short["calibration"] | {"token_weights": how}
        compress(model, recipe(short | {"calibration": calibration}, GPTQ), tmp_path / name)
        made[name] = shards(tmp_path / name)
    assert made["gradient"] == made["again"]
    assert made["gradient"] != made["alike"]


def test_a_step_that_weighs_no_tokens_needs_no_gradients(tmp_path: Path, tiny_model: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr("penjing.pipeline.walk.token_weights", lambda *_: pytest.fail("gradients were taken"))
    short = texts(tmp_path / "texts")
    calibration = short["calibration"] | {"token_weights": "gradient"}
    awq = {"method": "awq", "group_size": 32, "steps": 2}
    compress(tiny_model("llama"), recipe(short | {"calibration": calibration}, awq), tmp_path / "out")


def test_experts_are_said_to_have_tokens_that_count_alike(tmp_path: Path, tiny_model: Any) -> None:
    short = texts(tmp_path / "texts")
    calibration = short["calibration"] | {"token_weights": "gradient"}
    report = compress(tiny_model("mixtral"), recipe(short | {"calibration": calibration}, GPTQ), tmp_path / "out")
    said = {row.name: any("count alike" in note for note in row.notes) for row in report.modules if row.steps}
    assert all(told == (".experts." in name) for name, told in said.items())
    assert any(said.values())
