"""Targets kept to within one unit: of all models that a step could leave, the largest that will do is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import pytest

from penjing import api
from penjing.checkpoint import open_checkpoint
from penjing.engines import latency
from penjing.engines.latency import StepTime
from penjing.errors import PlanError, RecipeError
from penjing.models import layout_of
from penjing.models.layout import Layout
from penjing.pipeline.sizes import aimed, settle
from penjing.recipe import Recipe, load_recipe
from tiny_models import build

HEAD = 1e-3


def by_parameters(configs: Sequence[Mapping[str, Any]]) -> list[StepTime]:
    """A machine on which a block's time is proportional to its parameters."""
    return [StepTime(inside(layout_of(config)) * 1e-9 / layout_of(config).blocks, HEAD) for config in configs]


def inside(layout: Layout) -> int:
    return sum(module.parameters for module in layout.modules if module.block is not None)


def seconds(layout: Layout) -> float:
    return inside(layout) * 1e-9 + HEAD


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Layout]:
    path = build("llama", tmp_path_factory.mktemp("sizes"), layers=6, inner=96, hidden_size=64, tied=True)
    config = dict(open_checkpoint(path).config)
    return config, layout_of(config)


def of(*steps: dict[str, Any]) -> Recipe:
    return load_recipe({"version": 1, "steps": list(steps), "format": "dense"})


def made(recipe: Recipe, config: dict[str, Any], layout: Layout) -> Layout:
    (step,) = recipe.steps
    assert step.definition.remake is not None
    return layout_of(step.definition.remake.config(config, layout, step.options))


STEPS: dict[str, dict[str, Any]] = {
    "neurons": {"method": "neurons"},
    "neurons in eights": {"method": "neurons", "multiple": 8},
    "heads": {"method": "heads"},
    "both kinds": {"method": "llm-pruner"},
    "channels": {"method": "channels", "basis": "own"},
    "turned channels": {"method": "channels"},
    "flap": {"method": "flap"},
    "blocks": {"method": "greedy-layers"},
}


@pytest.mark.parametrize("name", STEPS)
def test_speedup_is_kept_to_within_one_unit(name: str, model: tuple[dict[str, Any], Layout]) -> None:
    """The model before it in the list of all would be too slow."""
    config, layout = model
    smallest = _all(STEPS[name], config, layout)[-1]
    wanted = 1 + 0.4 * (seconds(layout) / seconds(smallest) - 1)
    settled = settle(of(STEPS[name] | {"speedup": wanted}), config, layout, times=by_parameters)
    found = made(settled.recipe, config, layout)
    slack = 1 + 1e-9
    assert seconds(layout) / seconds(found) * slack >= wanted
    larger = [one for one in _all(STEPS[name], config, layout) if inside(one) > inside(found)]
    assert all(seconds(layout) / seconds(one) < wanted * slack for one in larger)
    assert "times as fast" in settled.notes[0]
    assert settled.recipe.steps[0].options.speedup is None  # type: ignore[attr-defined]


def _all(step: dict[str, Any], config: dict[str, Any], layout: Layout) -> list[Layout]:
    """Every model that a step could leave, from its own list of numbers of parameters or blocks."""
    options = of(step | {"sparsity": 0.5}).steps[0]
    remake = options.definition.remake
    assert remake is not None
    if remake.sizes is None:
        return [made(of(step | {"drop": gone}), config, layout) for gone in range(1, layout.blocks)]
    found = []
    for size in remake.sizes(config, layout, options.options):
        try:
            found.append(layout_of(size.config()))
        except PlanError:
            continue
        assert found[-1].parameters == size.parameters
    assert all(inside(large) > inside(small) for large, small in pairwise(found))
    return found


@pytest.mark.parametrize("method", ["shortgpt", "angular-layers", "greedy-layers", "replaceme"])
def test_blocks_by_params_and_by_share(method: str, model: tuple[dict[str, Any], Layout]) -> None:
    config, layout = model
    each = inside(layout) // layout.blocks
    for gone in range(1, layout.blocks):
        target = layout.parameters - each * gone
        for slack, expected in ((0, gone), (1, gone), (-1, gone + 1)):
            if expected < layout.blocks:
                settled = settle(of({"method": method, "params": target + slack}), config, layout)
                assert settled.recipe.steps[0].options.drop == expected  # type: ignore[attr-defined]
    settled = settle(of({"method": method, "sparsity": 0.5}), config, layout)
    assert settled.recipe.steps[0].options.drop == 3  # type: ignore[attr-defined]


def test_a_later_step_is_judged_by_the_model_it_is_given(model: tuple[dict[str, Any], Layout]) -> None:
    config, layout = model
    steps = ({"method": "shortgpt", "drop": 3}, {"method": "neurons", "speedup": 1.01})
    seen: list[int] = []

    def times(configs: Sequence[Mapping[str, Any]]) -> list[StepTime]:
        seen.append(configs[0]["num_hidden_layers"])
        return by_parameters(configs)

    settle(of(*steps), config, layout, times=times)
    assert seen == [3]


BAD: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "too fast": (
        PlanError,
        r"step 1 \(neurons\): speedup: 90.0 cannot .* units alone.* times as fast",
        {"speedup": 90},
    ),
    "two targets": (
        RecipeError,
        r"exactly one of `sparsity`, .*not `sparsity` and `speedup`",
        {"speedup": 2, "sparsity": 0.2},
    ),
    "no target": (RecipeError, r"exactly one of `sparsity`, `params`, `speedup`.*none", {}),
    "slower": (RecipeError, r"greater than 1", {"speedup": 0.5}),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals(name: str, model: tuple[dict[str, Any], Layout]) -> None:
    error, words, keys = BAD[name]
    with pytest.raises(error, match=words):
        settle(of({"method": "neurons", **keys}), *model, times=by_parameters)


def test_refusals_of_blocks(model: tuple[dict[str, Any], Layout]) -> None:
    config, layout = model
    for keys, words in (
        ({"params": 1000}, r"one block and what is outside have [\d,]+"),
        ({"params": "1B"}, r"asks for nothing: the model has"),
        ({"sparsity": 0.1}, r"less than one block"),
        ({"speedup": 50}, r"by removing blocks alone"),
    ):
        with pytest.raises(PlanError, match=words):
            settle(of({"method": "shortgpt", **keys}), config, layout, times=by_parameters)


def test_targets_from_the_command_line() -> None:
    neurons, wanda = {"method": "neurons", "sparsity": 0.2}, {"method": "wanda", "pattern": "2:4"}
    assert aimed(of(neurons)) == of(neurons)
    assert aimed(of(neurons), params="1M").steps[0].options.params == "1M"  # type: ignore[attr-defined]
    sparse = aimed(of(wanda), sparsity=0.25).steps[0].options
    assert (sparse.sparsity, sparse.pattern) == (0.25, None)  # type: ignore[attr-defined]
    assert aimed(of(neurons, wanda), speedup=1.5).steps[0].options.speedup == 1.5  # type: ignore[attr-defined]
    shorter = aimed(of({"method": "shortgpt", "drop": 2}), sparsity=0.5).steps[0].options
    assert (shorter.drop, shorter.sparsity) == (0, 0.5)  # type: ignore[attr-defined]
    for recipe, targets, words in (
        (of(neurons), {"sparsity": 0.5, "params": "1M"}, "two targets"),
        (of(neurons, wanda), {"sparsity": 0.5}, r"several steps .*step 1 \(neurons\), step 2 \(wanda\)"),
        (of(wanda), {"speedup": 2.0}, r"step 1 \(wanda\) makes weights zero, and the model keeps its shape"),
        (of({"method": "rtn"}), {"params": "1M"}, "no step of the recipe removes anything"),
    ):
        with pytest.raises(PlanError, match=words):
            aimed(recipe, **targets)  # type: ignore[arg-type]


def test_the_table_is_kept_and_never_falls(
    tmp_path: Any, model: tuple[dict[str, Any], Layout], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config, _ = model
    configs = [config | {"intermediate_size": width} for width in (96, 64, 32)]
    asked: list[int] = []

    def noisy(given: Sequence[Mapping[str, Any]]) -> list[StepTime]:
        asked.append(len(given))
        return [StepTime(block, HEAD) for block in (3e-3, 1e-3, 2e-3)]

    times = [latency.step_times(configs, measure=noisy) for _ in range(2)]
    assert times[0] == times[1] and asked == [3]
    assert [one.block for one in times[0]] == [3e-3, 1.5e-3, 1.5e-3]
    monkeypatch.setattr(latency.torch, "get_num_threads", lambda: 99)
    latency.step_times(configs, measure=noisy)
    assert asked == [3, 3]


def test_measured_and_planned(
    tmp_path: Any, model: tuple[dict[str, Any], Layout], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On this machine, without a stand-in: half the blocks or fewer for twice the speed."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = build("qwen2", tmp_path / "model", layers=6)
    plan = api.plan(path, {"version": 1, "steps": [{"method": "shortgpt", "speedup": 2}], "format": "dense"})
    assert 3 <= plan.drop <= 4
    assert "drop" in plan.warnings[0]
    assert api.plan(path, {"version": 1, "steps": [{"method": "shortgpt", "speedup": 2}]}).drop == plan.drop
