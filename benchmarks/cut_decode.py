"""Decoding with smaller models in plain transformers: how many times as fast, beside how many parameters are gone.

    python benchmarks/cut_decode.py --dense build/structured/dense --cut build/structured/penjing-neurons-20-percent \\
        --output benchmarks/results/cut_decode.json

`penjing bench` keeps all models loaded and goes over them in turn, the dense one first and last; one thread, fp32.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from penjing import api
from penjing.checkpoint import write_bytes
from penjing.engines.bench import Load
from penjing.evaluation.report import Software


def main() -> None:
    """Parse, time, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dense", type=Path, required=True)
    parser.add_argument("--cut", type=Path, nargs="+", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--length", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=32, help="tokens that are decoded")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    models = [options.dense, *options.cut, options.dense]
    load = Load(lengths=(options.length,), steps=options.steps, rounds=options.rounds)
    found = api.bench(models, ["transformers:float32"], load=load, threads=1)
    speeds = [row.speeds[0].decode.median for row in found.rows]
    dense, parameters = (speeds[0] + speeds[-1]) / 2, [api.inspect(model).layout.parameters for model in models]
    result: dict[str, Any] = {
        "software": Software.here().__dict__,
        "protocol": f"transformers in fp32, 1 thread, batch 1, prompt of {options.length} tokens, {options.steps} "
        f"decoded, medians of {options.rounds} rounds over all models in turn",
        "dense": {"parameters": parameters[0], "tokens_per_second": [speeds[0], speeds[-1]]},
        "cut": {
            path.name: {
                "parameters": count,
                "tokens_per_second": speed,
                "speedup": round(speed / dense, 3),
                "parameter_ratio": round(parameters[0] / count, 3),
            }
            for path, count, speed in zip(options.cut, parameters[1:-1], speeds[1:-1], strict=True)
        },
    }
    write_bytes(options.output, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result["cut"], indent=1))


if __name__ == "__main__":
    main()
