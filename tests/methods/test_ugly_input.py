"""Methods that work on a linear or a block, on what calibration and checkpoints can bring: always a finite answer."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import naive
from penjing.methods import METHODS
from penjing.methods.base import BlockInput, BlockTask, Call, LinearInput
from penjing.models.layout import InputGroup
from penjing.statistics import CrossGram, Statistics

ROWS, COLUMNS = 12, 48
BITS = {"bits": 3, "group_size": 16}
RATE = 1e-5
THIN = torch.outer(torch.arange(1.0, ROWS + 1), torch.arange(1.0, ROWS + 1))
FLEETING = {"iterations": 2, "batch_size": 1}

LINEAR: list[tuple[str, dict[str, Any]]] = [
    ("rtn", BITS),
    ("rtn", {"type": "nvfp4"}),
    ("rtn", {"type": "nf4", "group_size": 16, "double_quant": True}),
    ("rtn", {"type": "mxfp4"}),
    ("rtn", BITS | {"scale_rule": "signed-max", "scale_search": "weights"}),
    ("rtn", BITS | {"symmetric": False, "scale_search": "gram"}),
    ("gptq", BITS),
    ("gptq", BITS | {"symmetric": False, "asymmetric": True, "scale_search": "diagonal"}),
    ("gptq", BITS | {"order": "group-activation", "static_groups": False, "scale_search": "gram"}),
    ("gptq", BITS | {"symmetric": False, "zero": "float", "scale_search": "gram"}),
    ("gptq", BITS | {"two_sided": True, "scale_search": "diagonal"}),
    ("hqq", BITS | {"weighted": True}),
    ("awq", BITS),
    ("owq", BITS | {"columns": 2}),
    ("spqr", {"group_size": 8, "statistic_group": 4}),
    ("spqr", {"group_size": 8, "statistic_group": 4, "threshold": 0.2}),
    ("bcq", BITS),
    ("bcq", BITS | {"objective": "weights", "offset": True}),
    ("bcq", BITS | {"levels": "uniform"}),
    ("llm-int8", {}),
    ("xnor", {"weighted": True, "order": 2}),
    ("onebit", {}),
    ("billm", {"block_size": 48}),
    ("ternary", {"group_size": 16}),
    ("magnitude", {"sparsity": 0.5}),
    ("wanda", {"sparsity": 0.5, "refit": True}),
    ("sparsegpt", {"sparsity": 0.5}),
    ("sparsegpt", {"pattern": "2:4"} | BITS),
    ("alps", {"sparsity": 0.5, "rounds": 6}),
    ("svd", {"rank": 4}),
    ("asvd", {"rank": 4}),
    ("svd-llm", {"rank": 4}),
    ("pca", {"rank": 4}),
    ("nmf", {"rank": 4, "rounds": 3}),
    ("lqer", BITS | {"rank": 3}),
    ("tensor-train", {"rank": 2}),
    ("tensor-train-matrix", {"ratio": 0.5}),
    ("kmeans", {"group_size": 16, "compensate": True}),
    ("aqlm", {"book_bits": 3, "dimension": 4, "rounds": 1}),
]
LEARNT = [("autoround", BITS | FLEETING), ("zeroquant", BITS | FLEETING | {"learning_rate": RATE})]
FOLDED = [("awq", BITS | {"steps": 3}), ("awq", BITS | {"steps": 3, "scaling": "duo"}), ("smoothquant", {})]


def weights_of(kind: str) -> Tensor:
    weight = naive.random_weight(ROWS, COLUMNS)
    if kind == "constant":
        weight.fill_(0.3)
    elif kind == "zero":
        weight.zero_()
    elif kind == "tiny":
        weight *= 1e-30
    elif kind == "empty rows and groups":
        weight[3], weight[5, :16] = 0.0, 0.0
    return weight


def inputs_of(kind: str) -> Tensor:
    inputs = naive.correlated(96, COLUMNS)
    if kind == "dead columns":
        inputs[:, 4:24] = 0.0
    elif kind == "no signal":
        inputs.zero_()
    elif kind == "rank-deficient":
        inputs = inputs[:, :3] @ naive.correlated(3, COLUMNS, seed=2)
    elif kind == "one token":
        inputs = inputs[:1]
    elif kind == "one huge column":
        inputs[:, 7] *= 1e5
    return inputs


KINDS = (
    ("dead columns", "plain"),
    ("no signal", "plain"),
    ("rank-deficient", "empty rows and groups"),
    ("one token", "plain"),
    ("one huge column", "tiny"),
    ("plain", "constant"),
    ("dead columns", "zero"),
)
"""What is wrong with the inputs, and what with the weight."""


def seen(method: str, options: Any, inputs: Tensor) -> Statistics:
    """What the method needs, fed in one batch."""
    statistics = {needed: needed(COLUMNS) for needed in METHODS[method].needs(options)}
    for statistic in statistics.values():
        if isinstance(statistic, CrossGram):
            statistic.compare(inputs, 0.01 * inputs)
        else:
            statistic.update(inputs)
    return statistics


@pytest.mark.parametrize(("kind", "weights"), KINDS)
@pytest.mark.parametrize(("name", "keys"), LINEAR, ids=str)
def test_linear(name: str, keys: dict[str, Any], kind: str, weights: str) -> None:
    weight, inputs = weights_of(weights), inputs_of(kind)
    options = METHODS[name].options.model_validate(keys).for_matrix((ROWS, COLUMNS), torch.float32)
    given = LinearInput(
        weight, seen(name, options, inputs), storage_dtype=torch.float32, parts=(("linear", ROWS),), output_grams=[THIN]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = METHODS[name].linear(given, options).dense()
    assert found.shape == weight.shape and torch.isfinite(found).all()
    assert float((found @ inputs.T).norm()) <= 4 * float((weight @ inputs.T).norm()) + 1e-6
    if weights == "zero":
        assert not found.any()


@pytest.mark.parametrize(("kind", "weights"), KINDS)
@pytest.mark.parametrize(("name", "keys"), LEARNT, ids=str)
def test_learnt(name: str, keys: dict[str, Any], kind: str, weights: str) -> None:
    weight, inputs = weights_of(weights), inputs_of(kind).unsqueeze(0)

    def run(states: Tensor, given: Any) -> Tensor:
        return states @ given["linear"].T

    task = BlockTask({"linear": weight}, {}, run, inputs, inputs @ weight.T, {}, torch.float32)
    found = METHODS[name].learn(task, METHODS[name].options.model_validate(keys))["linear"].dense()
    assert torch.isfinite(found).all()
    assert float(found.abs().max()) <= 2 * float(weight.abs().max()) + 2 * RATE, "Adam moves by its rate, however small"


class Normed(nn.Module):
    """A norm and the linear that reads it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(COLUMNS)
        self.linear = nn.Linear(COLUMNS, ROWS, bias=False)
        self.linear.weight.data = weight


@pytest.mark.parametrize(("kind", "weights"), KINDS)
@pytest.mark.parametrize(("name", "keys"), FOLDED, ids=str)
def test_folded(name: str, keys: dict[str, Any], kind: str, weights: str) -> None:
    """Scales that would make a column or an input infinite, or vanish, are no scales."""
    options, inputs = METHODS[name].options.model_validate(keys), inputs_of(kind)
    group = InputGroup(linears=("linear",), source="norm", inside="linear")
    block = BlockInput(
        module=Normed(weights_of(weights)),
        groups=[group],
        statistics={"linear": seen(name, options, inputs)},
        calls={"linear": [Call((inputs,), {})]},
        storage_dtype=torch.float32,
    )
    scale = METHODS[name].transform(block, options)[group]
    assert torch.isfinite(scale).all() and (scale > 0).all() and torch.isfinite(1 / scale).all()


def test_no_method_is_left_out() -> None:
    for shape, cases in (("linear", LINEAR), ("learn", LEARNT), ("transform", FOLDED)):
        assert {name for name, _ in cases} == {name for name in METHODS if getattr(METHODS[name], shape)}
