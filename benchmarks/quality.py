"""Quality at equal stored bits: Penjing's recipes and its peers on the same windows, measured by the same code.

    python benchmarks/quality.py --calibration wiki.valid.raw --evaluation wiki.test.raw another.txt --bits 4 3 2 \\
        --peer-python PEER/bin/python --work build/quality --output benchmarks/results/quality.json

Every entry is symmetric with groups of 64 and scales in 16 bits, HQQ has groups of 128 with zero points, which take as
many; embedding and head stay as they are. The peers live in environments of their own (`pip install torch==2.13.0
llmcompressor==0.14.0 auto-round==0.15.1 hqq==0.2.8.post1`, and `gptqmodel==7.7.0`). What was measured before stays in
the output and is not measured again: remove the file to start afresh. `--only` names rows: some take an hour.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from gptq_speed import write_dense
from measured import Measured, import_baseline, run
from safetensors.torch import save_file

from penjing import api
from penjing.checkpoint import open_checkpoint, write_bytes
from penjing.evaluation.report import Software
from penjing.pipeline.text import TextSource
from penjing.recipe import Calibration

HERE, OUTPUT = Path(__file__).parent, "OUTPUT"


def ours(bits: int, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Name -> steps of each recipe that is compared."""
    grid = {"bits": bits, "group_size": 64, "scale_rule": "signed-max"}
    training = {"method": "e2e-qp", "batch_size": 4, "iterations": options.training}
    return {
        "rtn": [{"method": "rtn", **grid}],
        "gptq": [{"method": "gptq", **grid, "scale_search": "diagonal"}],
        "gptq, e2e-qp": [{"method": "gptq", **grid, "scale_search": "diagonal"}, training],
        "autoround": [{"method": "autoround", **grid, "iterations": 50}],
        "autoround, e2e-qp": [{"method": "autoround", **grid, "iterations": 50}, training],
    }


def theirs(bits: int, dense: Path, options: argparse.Namespace) -> dict[str, list[str]]:
    """Name -> command of each peer, but for where it writes: that takes the place of OUTPUT."""
    tokens = str(options.work / "tokens.safetensors")
    found: dict[str, list[str]] = {}
    if options.peer_python:
        script = [options.peer_python, str(HERE / "peer_llmcompressor.py"), str(dense), tokens, OUTPUT, str(bits), "64"]
        found |= {f"llmcompressor {name.upper()}": [*script, "float32", name] for name in ("gptq", "awq")}
        script = [options.peer_python, str(HERE / "peer_autoround.py"), str(dense), tokens, OUTPUT, str(bits), "64"]
        found |= {f"AutoRound {count} iterations": [*script, str(count)] for count in options.iterations}
        found["HQQ"] = [options.peer_python, str(HERE / "peer_hqq.py"), str(dense), OUTPUT, str(bits), "128"]
    if options.gptqmodel_python:
        script = [options.gptqmodel_python, str(HERE / "peer_gptqmodel.py"), str(dense), tokens, OUTPUT]
        found["GPTQModel"] = [*script, str(bits), "64"]
    return found


def main() -> None:
    """Parse, run what is missing, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", nargs="+", required=True, help="texts of several domains")
    parser.add_argument("--peer-python", help="has llmcompressor, auto-round and hqq")
    parser.add_argument("--gptqmodel-python", help="has gptqmodel")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--evaluation-length", type=int, default=2048)
    parser.add_argument("--training", type=int, default=48, help="iterations of e2e-qp")
    parser.add_argument("--iterations", type=int, nargs="*", default=[50, 200], help="of AutoRound")
    parser.add_argument("--only", nargs="*", help="rows by name, without their bits")
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
        jobs: dict[str, Callable[[str], dict[str, Any]]] = {
            f"penjing {name}": partial(own, dense=dense, steps=steps, options=options)
            for name, steps in ours(bits, options).items()
        }
        for name, command in theirs(bits, dense, options).items():
            jobs[name] = partial(peer, command=command, options=options)
        jobs = {f"{name}, {bits} bits": job for name, job in jobs.items() if not options.only or name in options.only}
        for name, job in jobs.items():
            if name not in result["runs"]:
                entry = job(name)
                entry["texts"] = measure(dense, entry.pop("directory"), options, result)
                result["runs"][name] = entry
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
    return {"directory": directory, **_spent(cost, import_baseline())}


def peer(name: str, command: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """A peer's script on the same windows."""
    directory = options.work / name.replace(" ", "-").replace(",", "")
    command = [str(directory) if word == OUTPUT else word for word in command]
    cost = run(command, options.work / "peer.log", HF_HUB_OFFLINE="1")
    found = next((path.parent for path in directory.rglob("config.json")), directory)
    return {"directory": found, **_spent(cost, import_baseline(command[0]))}


def _spent(cost: Measured, libraries: int) -> dict[str, float]:
    return {"seconds": cost.seconds, "processor_seconds": cost.processor, "memory": cost.peak - libraries}


def measure(dense: Path, made: Path, options: argparse.Namespace, result: dict[str, Any]) -> dict[str, Any]:
    """Perplexity and KL to the dense model, by text."""
    found = {}
    for text in options.evaluation:
        reference, measured = api.compare(
            [dense, made], data=text, windows=options.windows, length=options.evaluation_length
        )
        quality, name = measured.quality, Path(text).name
        told = {"protocol": reference.protocol.sentence(), "dense_perplexity": reference.quality.perplexity}
        result.setdefault("texts", {})[name] = told
        found[name] = {"perplexity": quality.perplexity, "kl": quality.kl, "top1": quality.top1}
    return found


if __name__ == "__main__":
    main()
