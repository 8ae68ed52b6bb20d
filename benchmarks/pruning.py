"""What pruning costs SmolLM2-135M: masks, masks with refitted weights, and sparsity per block.

    python benchmarks/pruning.py --output benchmarks/results/pruning.json

All runs share calibration and evaluation text, which are small so that the whole takes minutes on one core: compare the
rows with each other, not with published numbers.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import penjing

CASES: dict[str, dict[str, Any]] = {
    "wanda 50 %": {"method": "wanda", "sparsity": 0.5},
    "sparsegpt 50 %": {"method": "sparsegpt", "sparsity": 0.5},
    "magnitude 50 %": {"method": "magnitude", "sparsity": 0.5},
    "wanda 50 %, refitted": {"method": "wanda", "sparsity": 0.5, "refit": True},
    "sparsegpt 70 %": {"method": "sparsegpt", "sparsity": 0.7},
    "sparsegpt 70 %, owl": {"method": "sparsegpt", "sparsity": 0.7},
    "alps 50 %": {"method": "alps", "sparsity": 0.5},
    "magnitude 50 %, refitted": {"method": "magnitude", "sparsity": 0.5, "refit": True},
}


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--only", nargs="*", default=list(CASES), help="names of cases")
    options = parser.parse_args()
    text = {
        "calibration": {"samples": 8, "length": 256},
        "evaluation": {"windows": 8, "length": 256},
    }
    result: dict[str, Any] = {
        "hardware": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "software": {"torch": torch.__version__, "penjing": penjing.__version__},
        "model": options.model,
        **text,
        "runs": {},
    }
    for name in options.only:
        start = time.perf_counter()
        result["runs"][name] = run(options.model, name, text) | {"seconds": round(time.perf_counter() - start)}
        print(name, result["runs"][name], flush=True)
        if options.output:
            options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def run(model: str, name: str, text: dict[str, Any]) -> dict[str, Any]:
    """Perplexity, the dense model's, KL in nats per token and bytes."""
    recipe: Any = {"steps": [CASES[name]], "format": "native", **text}
    if name.endswith("owl"):
        recipe = penjing.distribute(model, recipe, by="owl").recipe
    with tempfile.TemporaryDirectory() as folder:
        report = penjing.compress(model, recipe, Path(folder) / "out")
    quality = report.quality
    assert quality is not None
    return {
        "perplexity": round(quality.perplexity, 3),
        "dense_perplexity": round(quality.reference_perplexity or 0, 3),
        "kl": round(quality.kl or 0, 4),
        "bytes": report.bytes,
    }


if __name__ == "__main__":
    main()
