"""Does a model cut for `speedup: 1.5` decode 1.5 times as fast as it did?

    OMP_NUM_THREADS=2 python benchmarks/speedup.py --work build/speedup --output benchmarks/results/speedup.json

For each kind of part: what the table of latencies promises, and what both models do in plain transformers, loaded side
by side and timed in turn. What is removed is chosen without care; only time is measured here. What was measured before
stays in the output and is not measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from penjing import api
from penjing.checkpoint import write_bytes
from penjing.engines.bench import Load
from penjing.evaluation.report import Software

STEPS: dict[str, dict[str, Any]] = {
    "neurons": {"method": "neurons", "score": "magnitude", "refit": False},
    "blocks": {"method": "shortgpt"},
    "channels": {"method": "channels", "basis": "own"},
    "heads and neurons": {"method": "llm-pruner"},
}
LOAD = Load(batches=(1,), lengths=(32,), steps=32, rounds=9)
ENGINE = "transformers:float32"


def main() -> None:
    """Parse, run what is missing, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--speedup", type=float, default=1.5)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only", nargs="*", default=list(STEPS))
    options = parser.parse_args()
    result: dict[str, Any] = {"runs": {}}
    if options.output.is_file():
        result = json.loads(options.output.read_text(encoding="utf-8"))
    for name in (name for name in options.only if name not in result["runs"]):
        result["runs"][name] = measured(STEPS[name] | {"speedup": options.speedup}, options)
        result["protocol"] = (
            f"{ENGINE}, batch 1, {LOAD.lengths[0]} tokens read, {LOAD.steps} decoded, {LOAD.rounds} rounds over both "
            "models in turn, median"
        )
        result["software"] = Software.here().__dict__
        write_bytes(options.output, (json.dumps(result, indent=1) + "\n").encode())
        print(name, json.dumps(result["runs"][name]), flush=True)


def measured(step: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Cut, and decode with both models."""
    recipe = {"steps": [step], "calibration": {"samples": 2, "length": 64}, "format": "dense", "dtype": "float32"}
    plan = api.plan(options.model, recipe)
    directory = options.work / "model"
    shutil.rmtree(directory, ignore_errors=True)
    api.compress(options.model, recipe, directory, evaluated=False)
    dense, cut = api.bench([options.model, directory], [ENGINE], load=LOAD).rows
    before, after = dense.speeds[0].decode, cut.speeds[0].decode
    return {
        "asked": options.speedup,
        "note": next(note for note in plan.warnings if "speedup" in note),
        "measured": round(after.median / before.median, 3),
        "tokens_per_second": [round(before.median, 2), round(after.median, 2)],
        "quartiles": [[round(one.low, 2), round(one.high, 2)] for one in (before, after)],
        "parameters": api.inspect(directory).layout.parameters,
        "dense_parameters": api.inspect(options.model).layout.parameters,
    }


if __name__ == "__main__":
    main()
