"""Quality at equal stored bits: Penjing's recipes and its peers on the same windows, measured by the same code.

    python benchmarks/quality.py --calibration wiki.valid.raw --evaluation wiki.test.raw --bits 4 3 2 \\
        --peer-python PEER/bin/python --work build/quality --output benchmarks/results/quality.json

Every entry is symmetric with groups of 64 and scales in 16 bits; embedding and head stay as they are. The peers live in
an environment of their own (`pip install torch==2.13.0 llmcompressor==0.14.0 auto-round==0.15.1`). What was measured
before stays in the output and is not measured again: remove the file to start afresh.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml
from gptq_speed import write_dense
from measured import import_baseline, run
from safetensors.torch import save_file

from penjing import api
from penjing.checkpoint import open_checkpoint, write_bytes
from penjing.evaluation.report import Software
from penjing.pipeline.text import TextSource
from penjing.recipe import Calibration

HERE = Path(__file__).parent


def ours(bits: int, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Name -> steps of each recipe that is compared."""
    grid = {"bits": bits, "group_size": 64, "scale_rule": "signed-max"}
    return {
        "rtn": [{"method": "rtn", **grid}],
        "gptq": [{"method": "gptq", **grid, "scale_search": "diagonal"}],
        "gptq, e2e-qp": [
            {"method": "gptq", **grid, "scale_search": "diagonal"},
            {"method": "e2e-qp", "batch_size": 4, "iterations": options.training},
        ],
    }


def main() -> None:
    """Parse, run what is missing, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--peer-python")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--evaluation-length", type=int, default=2048)
    parser.add_argument("--training", type=int, default=48, help="iterations of e2e-qp")
    parser.add_argument("--iterations", type=int, nargs="*", default=[50, 200], help="of AutoRound")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    dense = write_dense(options.work / "dense")
    calibration = TextSource(open_checkpoint(dense)).calibration(
        Calibration(data=options.calibration, samples=options.samples, length=options.length)
    )
    save_file({"tokens": calibration.tokens}, options.work / "tokens.safetensors")
    result: dict[str, Any] = {"runs": {}}
    if options.output.is_file():
        result = json.loads(options.output.read_text(encoding="utf-8"))
    for bits in options.bits:
        jobs = {
            f"penjing {name}, {bits} bits": (own, (dense, steps, options))
            for name, steps in ours(bits, options).items()
        }
        if options.peer_python:
            jobs[f"llmcompressor GPTQ, {bits} bits"] = (
                peer,
                (dense, "peer_llmcompressor.py", bits, "float32", options),
            )
            for count in options.iterations:
                name = f"AutoRound {count} iterations, {bits} bits"
                jobs[name] = (peer, (dense, "peer_autoround.py", bits, str(count), options))
        for name, (work, arguments) in jobs.items():
            if name not in result["runs"]:
                result["runs"][name] = measure(dense, work(name, *arguments), options, result)
                result["calibration"] = calibration.protocol.sentence()
                result["software"] = Software.here().__dict__
                write_bytes(options.output, (json.dumps(result, indent=1) + "\n").encode())
                print(name, json.dumps(result["runs"][name]), flush=True)


def own(name: str, dense: Path, steps: list[dict[str, Any]], options: argparse.Namespace) -> dict[str, Any]:
    """`penjing compress` as a user runs it, without the evaluation."""
    directory = options.work / name.replace(" ", "-").replace(",", "")
    calibration = {"data": options.calibration, "samples": options.samples, "length": options.length}
    recipe = options.work / "recipe.yaml"
    write_bytes(recipe, yaml.safe_dump({"version": 1, "steps": steps, "calibration": calibration}).encode())
    command = [sys.executable, "-m", "penjing", "compress", str(dense), "-r", str(recipe), "-o", str(directory)]
    cost = run([*command, "--no-eval"], options.work / "penjing.log")
    return {"directory": directory, "seconds": cost.seconds, "memory": cost.peak - import_baseline()}


def peer(name: str, dense: Path, script: str, bits: int, last: str, options: argparse.Namespace) -> dict[str, Any]:
    """A peer's script on the same windows."""
    directory = options.work / name.replace(" ", "-").replace(",", "")
    command = [options.peer_python, str(HERE / script), str(dense), str(options.work / "tokens.safetensors")]
    cost = run([*command, str(directory), str(bits), "64", last], options.work / "peer.log", HF_HUB_OFFLINE="1")
    memory = cost.peak - import_baseline(options.peer_python)
    found = next((path.parent for path in directory.rglob("config.json")), directory)
    return {"directory": found, "seconds": cost.seconds, "memory": memory}


def measure(dense: Path, entry: dict[str, Any], options: argparse.Namespace, result: dict[str, Any]) -> dict[str, Any]:
    """Perplexity and KL to the dense model."""
    models = [str(dense), str(entry.pop("directory"))]
    compared = api.compare(models, data=options.evaluation, windows=options.windows, length=options.evaluation_length)
    result["evaluation"] = compared[0].protocol.sentence()
    result["dense_perplexity"] = compared[0].quality.perplexity
    quality = compared[1].quality
    return {**entry, "perplexity": quality.perplexity, "kl": quality.kl, "top1": quality.top1}


if __name__ == "__main__":
    main()
