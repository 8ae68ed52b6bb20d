"""ZeroQuant: its rounding against a naive one, and what distillation on one block does."""

from __future__ import annotations

import pytest
import torch

from block_tasks import error, task
from penjing.methods.quantization.rtn import rtn
from penjing.methods.quantization.zeroquant import ZeroQuantOptions, learn
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Masked

GRID = IntegerGrid(3, 8, True, "wide", torch.float32)


def options(**keys: object) -> ZeroQuantOptions:
    return ZeroQuantOptions.model_validate({"bits": 3, "group_size": 8, "batch_size": 6, **keys})


def test_without_distillation_it_is_the_authors_rounding():
    given = task()
    for name, result in learn(given, options(iterations=0)).items():
        weight = given.weights[name].double().reshape(-1, 8)
        scale = (weight.abs().amax(1, keepdim=True) / 4).float().double()
        naive = ((weight / scale).round().clamp(-4, 3) * scale).reshape(given.weights[name].shape)
        assert torch.allclose(result.dense().double(), naive, atol=1e-6)


def test_distillation_brings_the_block_closer():
    given = task()
    nearest = {name: rtn(weight, GRID).dense() for name, weight in given.weights.items()}
    result = learn(given, options(iterations=150, learning_rate=3e-3))
    assert error(given, {name: r.dense() for name, r in result.items()}) < 0.8 * error(given, nearest)


def test_a_learning_rate_too_small_to_matter_changes_nothing():
    given = task()
    for name, result in learn(given, options(iterations=3, learning_rate=1e-12)).items():
        assert torch.equal(result.codes, rtn(given.weights[name], GRID).codes)


def test_pruned_weights_stay_zero():
    kept = torch.rand(24, 16, generator=torch.Generator().manual_seed(1)) > 0.5
    result = learn(task(kept=kept), options(iterations=3))["up"]
    assert isinstance(result, Masked) and not result.dense()[~kept].any()


def test_the_defaults_are_the_papers():
    defaults = ZeroQuantOptions()
    assert (defaults.iterations, defaults.learning_rate, defaults.scale_rule) == (100, pytest.approx(5e-6), "wide")
