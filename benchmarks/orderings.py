"""Do the methods rank on a real model as their papers say? Every row is a recipe on SmolLM2-135M.

    python benchmarks/orderings.py --calibration wiki.valid.raw --evaluation wiki.test.raw \\
        --output benchmarks/results/orderings.json

Rows that the output has are not run again (remove the file to start afresh, `--only` chooses some); the orderings are
written anew from all rows that are there. The text is short so that a row takes minutes: compare rows with each other,
not with published numbers. `bits` counts everything that is stored for the linears of the blocks.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import penjing
from penjing.evaluation.report import Report, Software

Steps = list[dict[str, Any]]


def four_four(**keys: Any) -> dict[str, Any]:
    """Weights of a row and inputs of a token rounded to 4 bits, each with one scale."""
    return {"method": "rtn", "bits": 4, "group_size": "channel", "activations": {"bits": 4}, **keys}


def grid(method: str, bits: int, size: int | str = 64, **keys: Any) -> Steps:
    """One step on the symmetric grid whose scale follows the sign of the largest weight."""
    return [{"method": method, "bits": bits, "group_size": size, "scale_rule": "signed-max", **keys}]


def searched(method: str, zero: str) -> Steps:
    """Three bits with a zero point, both it and the scale searched."""
    keys = {"bits": 3, "group_size": 64, "symmetric": False, "scale_search": "diagonal"}
    return [{"method": method, **keys, "zero": zero}]


ROWS: dict[str, Steps] = {
    **{f"rtn, {bits} bits": grid("rtn", bits) for bits in (4, 3, 2)},
    **{f"gptq, {bits} bits": grid("gptq", bits) for bits in (4, 3, 2)},
    **{f"gptq, {bits} bits, natural order": grid("gptq", bits, order="natural") for bits in (4, 3)},
    **{f"gptq, {bits} bits, two-sided": grid("gptq", bits, two_sided=True) for bits in (3, 2)},
    **{f"gptq, 3 bits, groups of {size}": grid("gptq", 3, size) for size in (32, 16)},
    **{f"gptq, 3 bits, {zero} zero": searched("gptq", zero) for zero in ("integer", "float")},
    "hqq, 3 bits": [{"method": "hqq", "bits": 3, "group_size": 64, "weighted": True}],
    "owq, 3 bits": grid("owq", 3, target_bits=3.2),
    "spqr, 3 bits": [{"method": "spqr", "bits": 3, "outliers": 0.01}],
    "rtn, 3 bits, float zero": searched("rtn", "float"),
    **{f"autoround, {bits} bits": grid("autoround", bits, iterations=50, batch_size=2) for bits in (3, 2)},
    "W4A4": [four_four()],
    "W4A4, smoothed": [{"method": "smoothquant"}, four_four()],
    "W4A4, rotated": [{"method": "rotation"}, four_four()],
    "W4A4, rotated, smoothed": [{"method": "rotation"}, {"method": "smoothquant"}, four_four()],
}

ORDERINGS: tuple[tuple[str, str, str], ...] = (
    *((f"GPTQ below RTN, {bits} bits", f"gptq, {bits} bits", f"rtn, {bits} bits") for bits in (4, 3, 2)),
    *(
        (f"activation order not worse, {bits} bits", f"gptq, {bits} bits", f"gptq, {bits} bits, natural order")
        for bits in (4, 3)
    ),
    ("OWQ below GPTQ of as many bits", "owq, 3 bits", "gptq, 3 bits, groups of 32"),
    ("SpQR below GPTQ of as many bits", "spqr, 3 bits", "gptq, 3 bits, groups of 16"),
    *((f"two-sided below GPTQ, {bits} bits", f"gptq, {bits} bits, two-sided", f"gptq, {bits} bits") for bits in (3, 2)),
    *((f"AutoRound below GPTQ, {bits} bits", f"autoround, {bits} bits", f"gptq, {bits} bits") for bits in (3, 2)),
    ("float zero points not worse", "gptq, 3 bits, float zero", "gptq, 3 bits, integer zero"),
    ("searched float zero points below HQQ", "rtn, 3 bits, float zero", "hqq, 3 bits"),
    ("rotation helps 4-bit inputs", "W4A4, rotated", "W4A4"),
    ("rotation below smoothing, 4-bit inputs", "W4A4, rotated", "W4A4, smoothed"),
)
"""What is claimed, the row that should be lower, the row that should be higher."""


def main() -> None:
    """Parse, run what is missing, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--length", type=int, default=1024, help="tokens of each of the 4 evaluation windows")
    parser.add_argument("--only", nargs="*", default=list(ROWS), help="names of rows")
    options = parser.parse_args()
    result: dict[str, Any] = {"model": options.model, "rows": {}}
    if options.output.is_file():
        result = json.loads(options.output.read_text(encoding="utf-8"))
    for name in options.only:
        if name in result["rows"]:
            continue
        report, seconds = compressed(name, options)
        assert report.calibration is not None or name.startswith(("rtn", "W4A4")), name
        assert report.protocol is not None and report.quality is not None
        result["rows"][name] = row(report) | {"seconds": round(seconds)}
        result["evaluation"] = report.protocol.sentence()
        result["dense_perplexity"] = report.quality.reference_perplexity
        if report.calibration is not None:
            result["calibration"] = report.calibration.sentence()
        result["software"] = Software.here().__dict__
        result["orderings"] = orderings(result["rows"])
        options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(name, json.dumps(result["rows"][name]), flush=True)
    for claim, found in orderings(result["rows"]).items():
        print(claim, json.dumps(found))


def compressed(name: str, options: argparse.Namespace) -> tuple[Report, float]:
    """The report of a row's recipe, and how many seconds it took with its evaluation."""
    recipe = {
        "steps": ROWS[name],
        "format": "native",
        "calibration": {"data": options.calibration, "samples": 16, "length": 512},
        "evaluation": {"data": options.evaluation, "windows": 4, "length": options.length},
    }
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        report = penjing.compress(options.model, recipe, Path(folder) / "out")
    return report, time.perf_counter() - start


def row(report: Report) -> dict[str, float]:
    """Perplexity, KL in nats per token, and bits per weight of the linears of the blocks."""
    linears = [module for module in report.modules if module.kind == "linear"]
    weights = sum(module.shape[0] * module.shape[1] for module in linears)
    assert report.quality is not None and report.quality.kl is not None
    return {
        "perplexity": round(report.quality.perplexity, 3),
        "kl": round(report.quality.kl, 4),
        "bits": round(8 * sum(module.bytes for module in linears) / weights, 3),
    }


def orderings(rows: dict[str, dict[str, float]]) -> dict[str, dict[str, Any]]:
    """For every claim whose two rows are there: KL, bits, and whether it holds."""
    return {
        claim: {
            "lower": lower,
            "higher": higher,
            "kl": [rows[lower]["kl"], rows[higher]["kl"]],
            "bits": [rows[lower]["bits"], rows[higher]["bits"]],
            "holds": rows[lower]["kl"] <= rows[higher]["kl"],
        }
        for claim, lower, higher in ORDERINGS
        if lower in rows and higher in rows
    }


if __name__ == "__main__":
    main()
