"""One recipe, one artefact: neurons removed and refitted, then recovery, then 4 bits; what each step costs and gives.

    python benchmarks/chain.py --calibration wiki.valid.raw --evaluation wiki.test.raw --work build/chain \\
        --output benchmarks/results/chain.json

The built-in recipe `narrow-recover-quantise`, and the same without its later steps. `penjing verify` loads every result
back (`difference`: of logits, over the largest), and all are measured on the same windows. What is in the work folder
is not made again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import yaml
from texts import text_arguments

from penjing import api
from penjing.checkpoint import write_bytes
from penjing.evaluation.report import Software
from penjing.recipe import builtin_recipes

KEPT = {"cut": 1, "cut, recovered": 2, "cut, recovered, 4 bits": 3}
"""Row -> how many steps of the recipe it has."""


def main() -> None:
    """Parse, run, verify, measure, write."""
    parser = text_arguments(__doc__, samples=8, evaluation_length=512)
    parser.add_argument("--steps", type=int, default=16, help="of recovery")
    parser.add_argument("--batch", type=int, default=2, help="windows per step")
    parser.add_argument("--recovery-length", type=int, default=256)
    parser.add_argument("--only", nargs="*", default=list(KEPT))
    options = parser.parse_args()
    made = {name: make(name, options) for name in options.only}
    measured = api.compare(
        [options.model, *made.values()],
        data=options.evaluation,
        windows=options.windows,
        length=options.evaluation_length,
    )
    result: dict[str, Any] = {
        "model": Path(options.model).name,
        "software": Software.here().__dict__,
        "calibration": f"{Path(options.calibration).name}, {options.samples} windows of {options.length} tokens",
        "recovery": f"{options.steps} steps of {options.batch} windows of {options.recovery_length} tokens",
        "evaluation": measured[0].protocol.sentence(),
        "dense": {"perplexity": measured[0].quality.perplexity},
        "runs": {},
    }
    for (name, directory), found in zip(made.items(), measured[1:], strict=True):
        result["runs"][name] = {
            "perplexity": found.quality.perplexity,
            "kl": found.quality.kl,
            "bytes": found.bytes,
            "difference": api.verify(directory).difference,
        }
        print(name, json.dumps(result["runs"][name]), flush=True)
    write_bytes(options.output, (json.dumps(result, indent=1) + "\n").encode())


def make(name: str, options: argparse.Namespace) -> Path:
    """The built-in recipe's first steps, with the texts of this run."""
    directory: Path = options.work / name.replace(",", "").replace(" ", "-")
    if (directory / "report.json").is_file():
        return directory
    recipe = yaml.safe_load(builtin_recipes()["narrow-recover-quantise"])
    steps = recipe["steps"][: KEPT[name]]
    for step in steps:
        if step["method"] == "recover":
            step |= {"steps": options.steps, "batch_size": options.batch, "micro_batch": options.batch}
            step |= {"data": options.calibration, "length": options.recovery_length}
            step |= {"learning_rate": 1e-3}
    recipe |= {
        "steps": steps,
        "calibration": {"data": options.calibration, "samples": options.samples, "length": options.length},
        "format": "compressed-tensors" if KEPT[name] == len(KEPT) else "dense",
    }
    api.compress(options.model, recipe, directory, evaluated=False)
    return directory


if __name__ == "__main__":
    main()
