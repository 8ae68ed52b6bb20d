"""Time to read a prompt: fp32 linears against linears that multiply int8, with dynamic and with static scales.

    python benchmarks/int8_prefill.py --output benchmarks/results/int8_prefill.json [--model demo] [--tokens 128 512]

Two parts: square linears for prompts of several lengths, and a whole model whose linears, the head apart, become what
they are when a native checkpoint is loaded. All variants take turns in every round, and ratios are taken within
a round, so that a busy machine disturbs all of them alike; medians are reported.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import penjing
from penjing.checkpoint import open_checkpoint
from penjing.methods.quantization.rtn import rtn
from penjing.numerics.activations import Activations, InputScale
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Scheme
from penjing.runtime import runner_for
from penjing.runtime.int8 import Int8Linear

GRID = IntegerGrid(8, None, True, "full", torch.float32)
STATIC = Activations(dynamic=False, granularity="tensor", symmetric=False)


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--model", default="demo", help="a model for its shape; empty: linears only")
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 256, 512, 1024])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "hardware": {"processor": _processor(), "threads": torch.get_num_threads()},
        "software": {"torch": torch.__version__, "penjing": penjing.__version__},
        "rounds": options.rounds,
        "linears": {str(tokens): linears(options.width, tokens, options.rounds) for tokens in options.tokens},
        "width": options.width,
    }
    if options.model:
        result["model"] = model(options.model, options.tokens, options.rounds)
    text = json.dumps(result, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


@torch.no_grad()
def linears(width: int, tokens: int, rounds: int) -> dict[str, Any]:
    """One linear (width, width) on `tokens` inputs."""
    generator = torch.Generator().manual_seed(0)
    dense = nn.Linear(width, width, bias=False)
    dense.weight.copy_(torch.randn(width, width, generator=generator) / width**0.5)
    coded = rtn(dense.weight, GRID)
    x = torch.randn(tokens, width, generator=generator)
    scale, zero = STATIC.fit(x.min().reshape(1), x.max().reshape(1))
    static = InputScale(scale, None if zero is None else zero.to(torch.int8))
    variants = {
        "fp32": dense,
        "int8 dynamic": Int8Linear(coded.codes, coded.scale, None, Activations()),
        "int8 static": Int8Linear(coded.codes, coded.scale, None, STATIC, static),
    }
    return race({name: lambda linear=linear: linear(x) for name, linear in variants.items()}, rounds)


@torch.no_grad()
def model(name: str, tokens: list[int], rounds: int) -> dict[str, Any]:
    """A whole model on prompts of random tokens. Weights are random: what they are does not matter to the clock."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = dict(open_checkpoint(name).config)
    config = AutoConfig.for_model(config.pop("model_type"), **config)
    dense = AutoModelForCausalLM.from_config(config).eval()
    models = {"fp32": dense, "int8 dynamic": in_int8(dense, Activations()), "int8 static": in_int8(dense, STATIC)}
    results = {}
    for length in tokens:
        prompt = torch.randint(1000, (1, length), generator=torch.Generator().manual_seed(length))
        calls = {
            variant: lambda loaded=loaded, prompt=prompt: loaded(prompt, use_cache=False, logits_to_keep=1)
            for variant, loaded in models.items()
        }
        results[str(length)] = race(calls, rounds)
    return {"name": name, "tokens": results}


def in_int8(dense: nn.Module, how: Activations) -> nn.Module:
    """The model with every linear of its blocks as an engine runs it."""
    made = copy.deepcopy(dense)
    scale, zero = how.fit(torch.tensor([-8.0]), torch.tensor([8.0]))
    static = None if how.dynamic else InputScale(scale, None if zero is None else zero.to(torch.int8))
    for name, linear in list(made.named_modules()):
        if isinstance(linear, nn.Linear) and "lm_head" not in name:
            runner = runner_for(linear, Scheme(GRID, activations=how), rtn(linear.weight, GRID), static)
            made.set_submodule(name, runner)
    return made


def race(calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, Any]:
    """Median milliseconds of each call, and the median over rounds of the first one's time over its own."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    first = next(iter(times.values()))
    return {
        name: {
            "milliseconds": round(1e3 * statistics.median(taken), 3),
            "speedup": round(statistics.median(a / b for a, b in zip(first, taken, strict=True)), 2),
        }
        for name, taken in times.items()
    }


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


if __name__ == "__main__":
    main()
