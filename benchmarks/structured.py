"""Structured removal on the demo model: what a score and the refit are worth at the same size.

    python benchmarks/structured.py --calibration wiki.valid.raw --evaluation wiki.test.raw \\
        --work build/structured --output benchmarks/results/structured.json

Every entry is one step; the result is a plain checkpoint with narrower blocks. All are measured on the same windows, by
the same code. What was measured before stays in the output and is not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from penjing import api
from penjing.checkpoint import write_bytes
from penjing.evaluation.report import Software

TWENTY = {"method": "neurons", "sparsity": 0.2}
ENTRIES: dict[str, dict[str, Any]] = {
    "neurons 20 %, magnitude": {**TWENTY, "score": "magnitude", "refit": False},
    "neurons 20 %, wanda-sp": {**TWENTY, "score": "wanda-sp", "refit": False},
    "neurons 20 %, wanda-sp, refit": {**TWENTY, "score": "wanda-sp"},
    "neurons 20 %, magnitude, refit": {**TWENTY, "score": "magnitude"},
    "neurons 20 %, obs, refit": {**TWENTY, "score": "obs"},
}


def main() -> None:
    """Parse, run what is missing, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--evaluation-length", type=int, default=1024)
    parser.add_argument("--only", nargs="*", default=list(ENTRIES))
    options = parser.parse_args()
    result: dict[str, Any] = {"runs": {}}
    if options.output.is_file():
        result = json.loads(options.output.read_text(encoding="utf-8"))
    for name in (name for name in options.only if name not in result["runs"]):
        result["runs"][name] = measure(name, ENTRIES[name], options, result)
        result["software"] = Software.here().__dict__
        write_bytes(options.output, (json.dumps(result, indent=1) + "\n").encode())
        print(name, json.dumps(result["runs"][name]), flush=True)


def measure(name: str, step: dict[str, Any], options: argparse.Namespace, result: dict[str, Any]) -> dict[str, Any]:
    """One step on the model: seconds, parameters, perplexity and KL to the dense model."""
    recipe = {
        "version": 1,
        "steps": [step],
        "calibration": {"data": options.calibration, "samples": options.samples, "length": options.length},
        "evaluation": {"data": options.evaluation, "windows": options.windows, "length": options.evaluation_length},
        "format": "dense",
    }
    directory = options.work / name.replace(" ", "-").replace(",", "").replace("%", "percent")
    start = time.perf_counter()
    report = api.compress(options.model, recipe, directory)
    quality = report.quality
    assert report.calibration is not None and report.protocol is not None and quality is not None
    result["calibration"], result["evaluation"] = report.calibration.sentence(), report.protocol.sentence()
    result["dense_perplexity"] = quality.reference_perplexity
    return {
        "seconds": round(time.perf_counter() - start, 1),
        "parameters": api.inspect(directory).layout.parameters,
        "dense_parameters": report.source.parameters,
        "perplexity": quality.perplexity,
        "kl": quality.kl,
        "top1": quality.top1,
    }


if __name__ == "__main__":
    main()
