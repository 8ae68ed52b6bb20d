"""What masks cost the demo model: by method and sparsity, with the kept weights refitted, with a sparsity per block.

    python benchmarks/pruning.py --calibration wiki.valid.raw --evaluation wiki.test.raw \\
        --work build/pruning --output benchmarks/results/pruning.json

All rows share calibration and evaluation text, which are small so that a row takes minutes on two cores: compare the
rows with each other, not with published numbers. What was measured before stays in the output and is not measured
again, and what was pruned before is not pruned again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import penjing
from penjing.checkpoint import write_bytes
from penjing.evaluation.report import Software

MASKS: dict[str, dict[str, Any]] = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "sparsegpt": {"method": "sparsegpt"},
    "wanda, refitted": {"method": "wanda", "refit": True},
    "magnitude, refitted": {"method": "magnitude", "refit": True},
    "alps": {"method": "alps"},
}
CASES: dict[str, dict[str, Any]] = {
    f"{name} {percent} %": {**step, "sparsity": percent / 100}
    for percent in (50, 60, 70)
    for name, step in MASKS.items()
}
DISTRIBUTED: dict[str, tuple[str, str]] = {
    f"{name} 70 %, {by}": (f"{name} 70 %", by) for name in ("wanda", "sparsegpt") for by in ("owl", "magnitude")
}
"""Case -> the case it takes its step from, and what gives every block its own sparsity."""


def main() -> None:
    """Parse, run what is missing, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", default="builtin")
    parser.add_argument("--evaluation", default="builtin")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--evaluation-length", type=int, default=512)
    parser.add_argument("--only", nargs="*", default=[*CASES, *DISTRIBUTED], help="names of cases")
    options = parser.parse_args()
    result: dict[str, Any] = {"model": Path(options.model).name, "runs": {}}
    if options.output.is_file():
        result = json.loads(options.output.read_text(encoding="utf-8"))
    wanted = [name for name in options.only if name not in result["runs"]]
    for name in wanted:
        options.work.mkdir(parents=True, exist_ok=True)
        result["calibration"] = make(name, options, folder(name, options))
        print(name, flush=True)
    models = [options.model, *(folder(name, options) for name in wanted)]
    measured = penjing.compare(
        models, data=options.evaluation, windows=options.windows, length=options.evaluation_length
    )
    result["evaluation"], result["dense_perplexity"] = measured[0].protocol.sentence(), measured[0].quality.perplexity
    for name, found in zip(wanted, measured[1:], strict=True):
        quality = {"perplexity": found.quality.perplexity, "kl": found.quality.kl, "top1": found.quality.top1}
        result["runs"][name] = {**quality, "bytes": found.bytes}
        print(name, json.dumps(result["runs"][name]), flush=True)
    result["software"] = Software.here().__dict__
    write_bytes(options.output, (json.dumps(result, indent=1) + "\n").encode())


def folder(name: str, options: argparse.Namespace) -> Path:
    """Where a case is written."""
    work: Path = options.work
    return work / name.replace(" ", "-").replace(",", "").replace("%", "percent")


def make(name: str, options: argparse.Namespace, directory: Path) -> str:
    """Prune and verify, unless it is there already; the text that was looked at."""
    case, by = DISTRIBUTED.get(name, (name, None))
    recipe: Any = {
        "version": 1,
        "steps": [CASES[case]],
        "calibration": {"data": options.calibration, "samples": options.samples, "length": options.length},
        "format": "native",
    }
    if not (directory / "report.json").is_file():
        if by:
            recipe = penjing.distribute(options.model, recipe, by=by).recipe
        penjing.compress(options.model, recipe, directory, evaluated=False)
    text = f"{options.calibration}, {options.samples} windows of {options.length} tokens"
    return text.rpartition("/")[2]


if __name__ == "__main__":
    main()
