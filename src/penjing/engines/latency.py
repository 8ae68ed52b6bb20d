"""How long a token takes in models of other widths: measured on this machine, and kept.

One token is decoded at batch 1 in plain transformers, whose time is the sum of what every block takes and what the head
takes, so a model of any depth follows from one block:

    t(L blocks) = L t_block + t_head

Models are built with random weights, as many blocks of them as do not fit in a cache, and timed in turn with the full
model: what a busy machine does to one step it does to its neighbour, so the median of ratios is steadier than a ratio
of medians. Times must not fall as models grow; where noise makes them, neighbours get their mean (isotonic regression).

The table lies in the user's cache directory, `latency.json`, by processor, threads, device, dtype and versions. It can
be read, and removed to measure afresh.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from penjing.checkpoint import write_bytes
from penjing.compiled import cache_directory
from penjing.evaluation.report import Software
from penjing.models import layout_of
from penjing.models.build import build_random
from penjing.models.shorter import shortened
from penjing.numerics.precision import compute_dtype

_COLD = 512 * 2**20
"""Bytes of blocks that no cache holds: weights come from memory, as they do in a whole model."""

_PROMPT, _WARM, _STEPS = 32, 4, 24
"""Tokens before the first that counts, steps that do not count, and steps of which the median is taken."""

_LEFT_OUT = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "use_cache")
"""Entries of config.json that change no time."""

Config = Mapping[str, Any]


@dataclass(frozen=True)
class StepTime:
    """Seconds of one decoded token: in each block, and in the head after them."""

    block: float
    head: float

    def of(self, blocks: int) -> float:
        """In a model of so many blocks."""
        return blocks * self.block + self.head


def step_times(
    configs: Sequence[Config],
    *,
    measure: Callable[[Sequence[Config]], list[StepTime]] | None = None,
    trust_remote_code: bool = False,
) -> list[StepTime]:
    """Times of models by config.json, the full one first and then ever smaller ones; from the table if they are there.

    measure  what is asked where the table has no answer; on this machine by default
    """
    words = [{key: value for key, value in config.items() if key not in _LEFT_OUT} for config in configs]

    def made() -> dict[str, Any]:
        found = (measure or _Measuring(trust_remote_code))(configs)
        times = zip(_rising([one.block for one in found]), _rising([one.head for one in found]), strict=True)
        parameters = [layout_of(config, trust_remote_code=trust_remote_code).parameters for config in configs]
        points = [
            {"parameters": count, "block": block, "head": head}
            for count, (block, head) in zip(parameters, times, strict=True)
        ]
        return {"model": configs[0].get("model_type"), "points": points}

    return [StepTime(point["block"], point["head"]) for point in remembered(words, made)["points"]]


def remembered(words: Any, make: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
    """What `make` measures on this machine, from the table if it is there; `words`, for JSON, say what it is."""
    path = cache_directory() / "latency.json"
    table: dict[str, Any] = {}
    with suppress(OSError, ValueError):  # no table yet, or a damaged one: what it held is measured again
        table = json.loads(path.read_text(encoding="utf-8"))
    machine = _machine()
    key = hashlib.sha256(json.dumps([machine, words], sort_keys=True, default=str).encode()).hexdigest()[:20]
    if key not in table:
        table[key] = {"machine": machine, **make()}
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        write_bytes(path, (json.dumps(table, indent=1) + "\n").encode())
    found: Mapping[str, Any] = table[key]
    return found


def machine_words() -> str:
    """What times were measured on, in a line."""
    machine = _machine()
    return f"{machine['cpu']}, {machine['threads']} threads, {machine['device']}, {machine['dtype']}"


def _machine() -> dict[str, Any]:
    software, device = Software.here(), _device()
    return {
        "cpu": software.cpu,
        "threads": software.threads,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "dtype": str(compute_dtype(device)).removeprefix("torch."),
        "torch": software.torch,
        "transformers": software.transformers,
    }


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _rising(falling: Sequence[float]) -> list[float]:
    """The nearest times, in squares, that do not grow from the largest model to the smallest."""
    pools: list[list[float]] = []
    for value in falling:
        pools.append([value])
        while len(pools) > 1 and statistics.fmean(pools[-2]) < statistics.fmean(pools[-1]):
            last = pools.pop()
            pools[-1] += last
    return [statistics.fmean(pool) for pool in pools for _ in pool]


class _Measuring:
    """Times models on the device where transformers would run them."""

    def __init__(self, trust_remote_code: bool) -> None:
        self._trust = trust_remote_code

    @torch.inference_mode()
    def __call__(self, configs: Sequence[Config]) -> list[StepTime]:
        layout = layout_of(configs[0], trust_remote_code=self._trust)
        inside = sum(module.parameters for module in layout.modules if module.block is not None)
        element = torch.empty(0, dtype=compute_dtype(_device())).element_size()
        blocks = min(layout.blocks, 1 + _COLD * layout.blocks // max(1, inside * element))
        full = _Decoder(shortened(configs[0], layout.blocks, range(blocks)), self._trust)
        own: list[StepTime] = []
        ratios: list[tuple[float, float]] = [(1.0, 1.0)]
        for config in configs[1:] or configs[:1]:
            other = _Decoder(shortened(config, layout.blocks, range(blocks)), self._trust)
            pairs = [(full.step(), other.step()) for _ in range(_WARM + _STEPS)][_WARM:]
            own += [mine for mine, _ in pairs]
            ratios.append(
                (
                    statistics.median(others.block / mine.block for mine, others in pairs),
                    statistics.median(others.head / mine.head for mine, others in pairs),
                )
            )
            full.restart()
        block = statistics.median(one.block for one in own) / blocks
        head = statistics.median(one.head for one in own)
        return [StepTime(block * inner, head * outer) for inner, outer in ratios[: len(configs)]]


class _Decoder:
    """A model with random weights that decodes token after token."""

    def __init__(self, config: Config, trust_remote_code: bool) -> None:
        self._device = _device()
        self._model = build_random(
            config, self._device, compute_dtype(self._device), trust_remote_code=trust_remote_code
        )
        self._body, self._head = self._model.base_model, self._model.get_output_embeddings()
        self.restart()

    def restart(self) -> None:
        """Read the prompt anew."""
        tokens = torch.ones(1, _PROMPT, dtype=torch.int64, device=self._device)
        self._cache = self._body(input_ids=tokens, use_cache=True).past_key_values

    def step(self) -> StepTime:
        """One token: the time of all blocks together, and of the head."""
        token = torch.ones(1, 1, dtype=torch.int64, device=self._device)
        start = self._now()
        states = self._body(input_ids=token, past_key_values=self._cache, use_cache=True).last_hidden_state
        between = self._now()
        self._head(states[:, -1:])
        return StepTime(between - start, self._now() - between)

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
