"""What gradients say of tokens and outputs, against autograd on the whole model; and what walks make of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import naive
from penjing import costs
from penjing.checkpoint import open_checkpoint
from penjing.errors import OutputError
from penjing.models import layout_of
from penjing.numerics.shrinkage import shrunk
from penjing.pipeline import walk
from penjing.pipeline.curvature import LEAST, Curvature, curvature
from penjing.pipeline.gradients import LARGEST
from penjing.pipeline.stream import StreamedModel
from penjing.pipeline.weights import Weights
from runs import compress, recipe, shards, texts
from tiny_models import token_windows

TOKENS = token_windows(5, 24)
GPTQ = {"method": "gptq", "bits": 3, "group_size": 32}


def silent(*_: object) -> None:
    pass


def seen(directory: Path, folder: Path | None = None) -> tuple[Any, Curvature]:
    """Layout and curvature of a model; with a folder that of outputs, too."""
    checkpoint = open_checkpoint(directory)
    layout = layout_of(checkpoint.config, checkpoint.specs())
    stream = StreamedModel(checkpoint.config, layout, Weights(checkpoint, layout).live)
    linears = layout.inside_blocks(module.name for module in layout.modules if module.kind == "linear")
    together = () if folder is None else [module.name for module in layout.modules if module.kind == "linear"]
    return layout, curvature(stream, TOKENS, linears, torch.float32, silent, folder=folder, together=together)


def gradients(directory: Path, names: list[str], sizes: list[int]) -> dict[str, list[torch.Tensor]]:
    """By the outputs of linears, fp64 (T, N) for every window, from the whole model in one piece; windows go in parts
    of `sizes`."""
    model, outputs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval(), {}
    for name in names:
        model.get_submodule(name).register_forward_hook(
            lambda _, args, output, name=name: outputs.update({name: output})
        )
    found: dict[str, list[torch.Tensor]] = {}
    for seed, part in enumerate(TOKENS.split(sizes)):
        generator = torch.Generator().manual_seed(seed)
        for window in part:
            logits = model(window[None]).logits[0]
            labels = naive.drawn_from(logits.softmax(1), generator)
            chosen = logits.log_softmax(1).gather(1, labels).sum()
            for name, each in zip(outputs, torch.autograd.grad(chosen, list(outputs.values())), strict=True):
                found.setdefault(name, []).append(each[0].double())
    return found


def expected(directory: Path, clusters: list[list[str]], sizes: list[int]) -> dict[str, torch.Tensor]:
    """Shares of squared gradients."""
    found = gradients(directory, [name for cluster in clusters for name in cluster], sizes)
    weights = {}
    for cluster in clusters:
        tokens = sum(torch.cat(found[name]).square().sum(1) for name in cluster)
        cut = (tokens / tokens.mean()).clamp(max=LARGEST) + LEAST
        weights |= {name: (cut / cut.mean()).float() for name in cluster}
    return weights


@pytest.mark.parametrize("sizes", [[5], [2, 2, 1]])
def test_weights_are_shares_of_squared_gradients(
    sizes: list[int], tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tiny_model("llama")
    monkeypatch.setattr("penjing.pipeline.curvature.windows_at_once", lambda *_: sizes[0])
    layout, looked = seen(directory)
    found = looked.token_weights
    assert found is not None
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
    found = seen(tiny_model("mixtral"))[1].token_weights
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
    monkeypatch.setattr("penjing.pipeline.walk.curvature", lambda *_: pytest.fail("gradients were taken"))
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


@pytest.mark.parametrize("sizes", [[5], [2, 2, 1]])
@pytest.mark.parametrize("largest", [LARGEST, 1.5])
def test_output_grams_are_those_of_gradients_without_what_is_chance(
    sizes: list[int], largest: float, tmp_path: Path, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penjing.pipeline.curvature.windows_at_once", lambda *_: sizes[0])
    monkeypatch.setattr("penjing.pipeline.gradients.LARGEST", largest)
    monkeypatch.setattr("penjing.numerics.output_feedback.OUTPUTS_TOGETHER", 48)
    monkeypatch.setattr("penjing.costs.BATCH_TOKENS", 24)
    monkeypatch.setattr("penjing.pipeline.stream.BATCH_TOKENS", 24)  # a window at a time
    directory = tiny_model("llama")
    layout, found = seen(directory, tmp_path / "gradients")
    names = [module.name for module in layout.modules if module.kind == "linear" and module.block is not None]
    reference = gradients(directory, names, sizes)
    for index in range(layout.blocks):
        prefix = f"{layout.block_name(index)}."
        grams = found.output_grams(index)
        assert sorted(grams) == sorted(name.removeprefix(prefix) for name in names if name.startswith(prefix))
        for name, blocks in grams.items():
            cut = []
            for each in reference[prefix + name]:
                squares = each.square().sum(1)
                cut.append(each * (squares.clamp(max=largest * squares.mean()) / squares).sqrt().unsqueeze(1))
            whole, start = torch.cat(cut), 0
            for block in blocks:
                part = whole[:, start : start + len(block)]
                expected = shrunk(part.T @ part, len(part), float(part.square().sum(1).square().sum())).float()
                torch.testing.assert_close(block, expected, rtol=5e-3, atol=float(expected.abs().max()) * 1e-4)
                start += len(block)
            assert start == whole.shape[1]
    files = (tmp_path / "gradients").iterdir()
    held = sum(
        gram.numel() * 4
        for index in range(layout.blocks)
        for grams in found.output_grams(index).values()
        for gram in grams
    )
    assert (
        held
        == costs.bytes_of_gradients(layout.by_name[name] for name in names)
        < sum(path.stat().st_size for path in files)
    )


@pytest.mark.parametrize("weights", ["alike", "gradient"])
def test_a_recipe_that_joins_outputs_gives_other_codes_each_time_the_same(
    weights: str, tmp_path: Path, tiny_model: Any
) -> None:
    model, short = tiny_model("llama"), texts(tmp_path / "texts")
    short = short | {"calibration": short["calibration"] | {"token_weights": weights}}
    both = GPTQ | {"two_sided": True}
    for name, step in {"one": GPTQ, "both": both, "again": both}.items():
        compress(model, recipe(short, step), tmp_path / name)
    assert shards(tmp_path / "both") == shards(tmp_path / "again")
    assert shards(tmp_path / "both") != shards(tmp_path / "one")
    assert not (tmp_path / "both" / ".penjing" / "gradients").exists()


def test_no_room_for_gradients_is_said_before_they_are_taken(
    tmp_path: Path, tiny_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result would fit, the Gram matrices of gradients beside it would not."""
    model, short = tiny_model("llama"), texts(tmp_path / "texts")
    compress(model, recipe(short, GPTQ), tmp_path / "one")
    free = sum(path.stat().st_size for path in (tmp_path / "one").glob("*.safetensors")) + 1000
    monkeypatch.setattr(walk.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2 * free, free, free))
    monkeypatch.setattr(walk, "curvature", lambda *_, **__: pytest.fail("gradients were taken"))
    with pytest.raises(OutputError, match="MB free"):
        compress(model, recipe(short, GPTQ | {"two_sided": True}), tmp_path / "both")
