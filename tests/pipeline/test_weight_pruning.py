"""Pruning single weights by gradients, on whole tiny models: whose gradients, how many go, what stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from penjing import api
from penjing.checkpoint import open_checkpoint
from penjing.errors import PlanError, RecipeError
from penjing.pipeline.text import TextSource
from penjing.recipe import Calibration
from runs import compress, recipe, texts


@pytest.fixture
def short(tmp_path: Path) -> dict[str, Any]:
    return texts(tmp_path / "texts")


def tensors(directory: Path) -> dict[str, Tensor]:
    checkpoint = open_checkpoint(directory)
    return {name: checkpoint.load(name).float() for name in checkpoint.specs()}


def run(model: Path, short: dict[str, Any], output: Path, *steps: dict[str, Any]) -> tuple[Any, dict[str, Tensor]]:
    report = compress(model, recipe(short, *steps, format="dense"), output, evaluated=False)
    return report, tensors(output)


def inside(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in found.items() if value.ndim == 2 and ("layers." in name or ".h." in name)}


def reference(model: Path, short: dict[str, Any], criterion: str) -> dict[str, Tensor]:
    """Scores from autograd through the whole model as transformers runs it, in fp64."""
    from transformers import AutoModelForCausalLM

    live = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    tokens = TextSource(open_checkpoint(model)).calibration(Calibration(**short["calibration"])).tokens
    leaves = {n: p for n, p in live.named_parameters() if n in inside(dict(live.named_parameters()))}
    parts = [torch.autograd.grad(live(row[None], labels=row[None]).loss, list(leaves.values())) for row in tokens]
    result = {}
    for number, (name, leaf) in enumerate(leaves.items()):
        g = torch.stack([part[number] for part in parts])
        w = leaf.detach()
        result[name] = {
            "taylor": (w * g.mean(0)).abs(),
            "taylor-per-text": (w * g).abs().mean(0),
            "fisher": w.square() * g.square().mean(0),
        }[criterion]
    return result


@pytest.mark.parametrize(
    ("family", "criterion", "scope"),
    [("llama", "fisher", "global"), ("gpt2", "taylor", "layer"), ("llama", "taylor-per-text", "row")],
)
def test_the_lowest_scores_of_the_whole_model_go(family, criterion, scope, tiny_model, short, tmp_path) -> None:
    model = tiny_model(family)
    step = {"method": "taylor", "sparsity": 0.4, "criterion": criterion, "scope": scope}
    report, after = run(model, short, tmp_path / "out", step)
    wanted, before = reference(model, short, criterion), tensors(model)
    names = list(wanted)
    if scope == "global":
        joined = torch.cat([wanted[name].flatten() for name in names])
        least = joined.sort().values[int(joined.numel() * 0.4)]
        limits = {name: least.expand(1) for name in names}
        assert sum(int((after[name] == 0).sum()) for name in names) == int(joined.numel() * 0.4 + 1e-6)
    else:
        shaped = {name: wanted[name] if scope == "row" else wanted[name].reshape(1, -1) for name in names}
        drop = {name: int(part.shape[1] * 0.4 + 1e-6) for name, part in shaped.items()}
        limits = {name: part.sort(1).values[:, drop[name]][:, None] for name, part in shaped.items()}
        for name, part in shaped.items():
            assert ((after[name].reshape(part.shape) == 0).sum(1) == drop[name]).all()
    for name in names:
        stays = wanted[name] >= (limits[name] if scope == "row" else limits[name].view(1, 1))
        clear = (wanted[name] / (limits[name] if scope == "row" else limits[name].view(1, 1)) - 1).abs() > 1e-3
        assert clear.double().mean() > 0.98
        assert torch.equal((after[name] != 0)[clear], stays[clear]), name
        assert torch.equal(after[name], before[name] * (after[name] != 0))
    shares = report.made[0]["zeros"]
    assert shares[names[0].removesuffix(".weight")] == pytest.approx(
        float((after[names[0]] == 0).float().mean()), abs=1e-5
    )


def test_protected_blocks_stay_and_what_is_gone_counts(tiny_model, short, tmp_path) -> None:
    model = tiny_model("llama", layers=3)
    steps = [
        {"method": "magnitude", "sparsity": 0.3, "targets": ["*.mlp.*"]},
        {"method": "taylor", "sparsity": 0.5, "scope": "global", "protect_first": 1, "protect_last": 1},
    ]
    report, after = run(model, short, tmp_path / "out", *steps)
    before, first = tensors(model), run(model, short, tmp_path / "first", steps[0])[1]
    for name, value in inside(after).items():
        if ".layers.1." not in name:
            assert torch.equal(value, first[name])
        elif "mlp" in name:
            assert not (value[first[name] == 0]).any()
    middle = [value for name, value in inside(after).items() if ".layers.1." in name]
    assert sum(int((value == 0).sum()) for value in middle) == int(sum(value.numel() for value in middle) * 0.5)
    assert set(report.made[0]["zeros"]) == {n.removesuffix(".weight") for n in inside(before) if ".layers.1." in n}


def test_a_pattern_is_kept_by_the_quantiser_after_it(tiny_model, short, tmp_path) -> None:
    steps = [{"method": "taylor", "pattern": "2:4", "criterion": "taylor"}, {"method": "rtn", "group_size": 32}]
    wanted = recipe(short, *steps, format="native")
    found = api.plan(tiny_model("llama"), wanted)
    row = next(row for row in found.rows if row.module.name.endswith("0.mlp.up_proj"))
    assert row.scheme.pattern == (2, 4) and row.scheme.grid is not None
    compress(tiny_model("llama"), wanted, tmp_path / "out", evaluated=False)
    report = api.verify(tmp_path / "out")
    assert report.difference < 1e-3


def test_experts_that_no_token_reached_are_judged_by_magnitude(tiny_model, short, tmp_path) -> None:
    short["calibration"] |= {"samples": 1, "length": 8}
    model = tiny_model("mixtral", num_local_experts=8, num_experts_per_tok=1)
    report, after = run(model, short, tmp_path / "out", {"method": "taylor", "sparsity": 0.5})
    before = tensors(model)
    assert report.made[0]["unreached"]
    for name in report.made[0]["unreached"]:
        weight, kept = before[f"{name}.weight"], after[f"{name}.weight"] != 0
        assert float(weight[kept].abs().min()) >= float(weight[~kept].abs().max())


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ({"pattern": "3:7"}, r"pattern 3:7: model.layers.0.self_attn.q_proj has 64 inputs, which is no multiple of 7"),
        ({"sparsity": 0.5, "protect_first": 2}, "leave none of 2 blocks to change"),
    ],
)
def test_what_cannot_be_is_refused_at_plan_time(step, message, tiny_model, short) -> None:
    with pytest.raises(PlanError, match=message):
        api.plan(tiny_model("llama"), recipe(short, {"method": "taylor", **step}, format="dense"))


@pytest.mark.parametrize("sparsity", [0, 1, -0.5, 1.5])
def test_bad_amounts(sparsity, tiny_model, short) -> None:
    with pytest.raises(RecipeError, match="sparsity"):
        api.plan(tiny_model("llama"), recipe(short, {"method": "taylor", "sparsity": sparsity}))


def test_the_plan_knows_what_the_way_back_keeps(tiny_model, short) -> None:
    key = "inputs of all blocks, in fp32"
    for criterion, looks in (("fisher", True), ("magnitude", False)):
        step = {"method": "taylor", "sparsity": 0.5, "criterion": criterion}
        before = api.plan(tiny_model("llama", layers=3), recipe(short, step, format="dense")).walks[0]
        assert before.memory.get(key, 0) == (4 * 4 * 32 * 64 * 5 if looks else 0)
