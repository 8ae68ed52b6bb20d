"""One token through a linear: dense weights, 4-bit weights, ternary weights, binary weights.

    python benchmarks/binary_gemv.py --output benchmarks/results/binary_gemv.json

Shapes are the linears of models of about 1B parameters (hidden 2048, feed-forward 8192) and 7B (4096, 11008).
Codes are random, since speed does not look at values. All variants take turns in every round. The median round of each
says how it was, the fastest what the machine can do when nobody else uses it; ratios are those of the fastest. Between
two products the cache is overwritten, as the rest of a model would.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lut_gemm import matmul_nbits, processor, random_linear
from torch.nn.functional import linear

import penjing
from penjing.numerics.binary_coding import BinaryGrid
from penjing.numerics.ternary import TernaryGrid
from penjing.representations import Quantized
from penjing.runtime.ternary import TernaryLinear

SHAPES = {
    "1B": ((2048, 2048), (8192, 2048), (2048, 8192)),
    "7B": ((4096, 4096), (11008, 4096), (4096, 11008)),
}

CACHE = 64 << 20
"""Bytes that are overwritten between two products: more than the last-level cache of most processors."""


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "hardware": {"processor": processor(), "threads": torch.get_num_threads()},
        "software": {"torch": torch.__version__, "penjing": penjing.__version__},
        "rounds": options.rounds,
        "tokens": 1,
        "linears": {
            model: {f"{rows}x{columns}": measure(rows, columns, options.rounds) for rows, columns in shapes}
            for model, shapes in SHAPES.items()
        },
    }
    text = json.dumps(result, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


@torch.inference_mode()
def measure(rows: int, columns: int, rounds: int) -> dict[str, Any]:
    """Microseconds of each variant, and how many times as fast as dense fp32 and bf16 it is."""
    weight, x = torch.randn(rows, columns), torch.randn(1, columns)
    half, half_x = weight.bfloat16(), x.bfloat16()
    layers = {
        "4 bits": random_linear(rows, columns, BinaryGrid(4, 128)),
        "ternary": _ternary(rows, columns, 128),
        "ternary, scale per output": _ternary(rows, columns, None),
        "binary": random_linear(rows, columns, BinaryGrid(1, 128)),
    }
    variants: dict[str, Callable[[], object]] = {
        "fp32": lambda: linear(x, weight),
        "bf16": lambda: linear(half_x, half),
        **{name: (lambda layer=layer: layer(x)) for name, layer in layers.items()},
    }
    if session := matmul_nbits(rows, columns):
        given = {"x": x.numpy()}
        variants["onnxruntime 4 bits"] = lambda: session.run(None, given)
    times: dict[str, list[float]] = {name: [] for name in variants}
    elsewhere = torch.zeros(CACHE, dtype=torch.uint8)
    for number in range(rounds + 1):
        for name, run in variants.items():
            elsewhere.add_(1)
            start = time.perf_counter()
            run()
            if number:
                times[name].append(time.perf_counter() - start)
    fastest = {name: min(taken) for name, taken in times.items()}
    return {
        name: {
            "median_microseconds": round(statistics.median(taken) * 1e6, 1),
            "fastest_microseconds": round(fastest[name] * 1e6, 1),
            "times_as_fast_as_fp32": round(fastest["fp32"] / fastest[name], 2),
            "times_as_fast_as_bf16": round(fastest["bf16"] / fastest[name], 2),
        }
        for name, taken in times.items()
    }


def _ternary(rows: int, columns: int, size: int | None) -> TernaryLinear:
    grid = TernaryGrid(group_size=size)
    codes = torch.randint(-1, 2, (rows, columns), dtype=torch.int8)
    return TernaryLinear(Quantized(codes, torch.rand(rows, grid.groups(columns)).bfloat16(), None, grid))


if __name__ == "__main__":
    main()
