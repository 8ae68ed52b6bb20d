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
import statistics
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from penjing import api
from penjing.checkpoint import write_bytes
from penjing.engines.base import LoadRequest
from penjing.engines.process import EngineProcess, default_threads
from penjing.engines.table import model_path
from penjing.evaluation.report import Software

STEPS: dict[str, dict[str, Any]] = {
    "neurons": {"method": "neurons", "score": "magnitude", "refit": False},
    "blocks": {"method": "shortgpt"},
    "channels": {"method": "channels", "basis": "own"},
    "heads and neurons": {"method": "llm-pruner"},
}
PROMPT, STEPS_PER_ROUND, ROUNDS = 32, 8, 40
"""Short rounds, so that both models of a round see the same machine; the first round does not count."""


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
            f"transformers, float32, batch 1, {PROMPT} tokens read, {STEPS_PER_ROUND} decoded by one model and then by "
            f"the other, {ROUNDS} times; median and quartiles of the ratio of each round"
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
    seconds = in_turn([model_path(options.model, trust_remote_code=False), directory])
    low, median, high = statistics.quantiles([dense / cut for dense, cut in seconds], n=4, method="inclusive")
    return {
        "asked": options.speedup,
        "note": next(note for note in plan.warnings if "speedup" in note),
        "measured": round(median, 3),
        "quartiles": [round(low, 3), round(high, 3)],
        "milliseconds": [round(1e3 * statistics.median(side), 2) for side in zip(*seconds, strict=True)],
        "parameters": api.inspect(directory).layout.parameters,
        "dense_parameters": api.inspect(options.model).layout.parameters,
    }


def in_turn(paths: list[Path]) -> list[tuple[float, float]]:
    """Seconds per token of the two models, round by round."""
    with ExitStack() as stack:
        running = [
            stack.enter_context(EngineProcess("transformers", LoadRequest(path, "float32", default_threads())))
            for path in paths
        ]
        tokens = np.random.default_rng(0).integers(0, running[0].vocabulary, (1, PROMPT), dtype=np.int64)
        rounds = [[process.time(tokens, STEPS_PER_ROUND).step for process in running] for _ in range(ROUNDS + 1)]
    return [(dense, cut) for dense, cut in rounds[1:]]


if __name__ == "__main__":
    main()
