"""Quality at equal stored bits: Penjing's recipes and its peers on the same windows, measured by the same code.

    python benchmarks/quality.py --calibration wiki.valid.raw --evaluation wiki.test.raw another.txt --bits 4 3 2 \\
        --peer-python PEER/bin/python --work build/quality --output benchmarks/results/quality.json

Every entry is symmetric with groups of 64 and scales in 16 bits, HQQ has groups of 128 with zero points, which take as
many; embedding and head stay as they are. The peers live in environments of their own (`pip install torch==2.13.0
llmcompressor==0.14.0 auto-round==0.15.1 hqq==0.2.8.post1`, and `gptqmodel==7.7.0`). Models are made first, one after
the other, each with a note of what it cost beside it; then all of them are measured together, so that the dense model
runs once for each text. What was made or measured before is not done again. `--only` names rows: some take an hour.
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
from penjing.recipe import Calibration, load_recipe

HERE, OUTPUT = Path(__file__).parent, "OUTPUT"

AWQ_WINDOWS = 8
"""Of 64: for every scale its search runs parts of a block twenty times over all text, two hours of a core for 64."""


def ours(bits: int) -> dict[str, dict[str, Any]]:
    """Name -> recipe of each that is compared, but for its calibration text."""
    grid = {"bits": bits, "group_size": 64, "scale_rule": "signed-max"}
    best = load_recipe(f"best-{bits}bit").as_dict()
    best_text = {key: best["calibration"][key] for key in ("token_weights", "written")}
    return {
        "rtn": {"steps": [{"method": "rtn", **grid}]},
        "gptq": {"steps": [{"method": "gptq", **grid, "scale_search": "diagonal"}]},
        "gptq, tokens weighed": {
            "steps": [{"method": "gptq", **grid, "scale_search": "diagonal"}],
            "calibration": {"token_weights": "gradient"},
        },
        f"best-{bits}bit": {"steps": best["steps"], "calibration": best_text, "allocate": best["allocate"]},
    }


def theirs(bits: int, dense: Path, options: argparse.Namespace) -> dict[str, list[str]]:
    """Name -> command of each peer, but for where it writes: that takes the place of OUTPUT."""
    tokens = str(options.work / "tokens.safetensors")
    found: dict[str, list[str]] = {}
    if options.peer_python:
        script = [options.peer_python, str(HERE / "peer_llmcompressor.py"), str(dense), tokens, OUTPUT, str(bits), "64"]
        found["llmcompressor GPTQ"] = [*script, "float32", "gptq"]
        found[f"llmcompressor AWQ, {AWQ_WINDOWS} windows"] = [*script, "float32", "awq", str(AWQ_WINDOWS)]
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
    parser.add_argument("--windows", type=int, nargs="+", default=[12, 6], help="of each text")
    parser.add_argument("--evaluation-length", type=int, default=2048)
    parser.add_argument("--iterations", type=int, nargs="*", default=[50, 200], help="of AutoRound")
    parser.add_argument("--only", nargs="*", help="rows by name, without their bits")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    dense = write_dense(options.work / "dense")
    calibration = TextSource(open_checkpoint(dense)).calibration(
        Calibration(data=options.calibration, samples=options.samples, length=options.length)
    )
    save_file({"tokens": calibration.tokens}, options.work / "tokens.safetensors")
    costs = {name: make(name, job, options) for name, job in jobs(dense, options).items()}
    result: dict[str, Any] = {"runs": {}}
    if options.output.is_file():
        result = json.loads(options.output.read_text(encoding="utf-8"))
    fresh = {name: made for name, (made, _) in costs.items() if name not in result["runs"]}
    if not fresh:
        return
    measured = measure(dense, fresh, options, result)
    for name in fresh:
        result["runs"][name] = costs[name][1] | {"texts": measured[name]}
        print(name, json.dumps(result["runs"][name]), flush=True)
    result["calibration"] = calibration.protocol.sentence()
    result["software"] = Software.here().__dict__
    write_bytes(options.output, (json.dumps(result, indent=1) + "\n").encode())


def jobs(dense: Path, options: argparse.Namespace) -> dict[str, list[str]]:
    """Row -> command that makes its model."""
    found = {}
    for bits in options.bits:
        for name, keys in ours(bits).items():
            if not options.only or name in options.only:
                found[f"penjing {name}, {bits} bits"] = own(f"{name}-{bits}", dense, keys, options)
        for name, command in theirs(bits, dense, options).items():
            if not options.only or name in options.only:
                found[f"{name}, {bits} bits"] = command
    return found


def own(name: str, dense: Path, keys: dict[str, Any], options: argparse.Namespace) -> list[str]:
    """`penjing compress` as a user runs it, without the evaluation."""
    calibration = {"data": options.calibration, "samples": options.samples, "length": options.length}
    recipe = {"version": 1, **keys, "calibration": calibration | keys.get("calibration", {})}
    path = options.work / f"{_file_name(name)}.yaml"
    write_bytes(path, yaml.safe_dump(recipe).encode())
    return [sys.executable, "-m", "penjing", "compress", str(dense), "-r", str(path), "-o", OUTPUT, "--no-eval"]


def make(name: str, command: list[str], options: argparse.Namespace) -> tuple[Path, dict[str, float]]:
    """Directory of the model of a row, and what it cost: seconds, seconds of processors, bytes above the libraries."""
    directory = options.work / _file_name(name)
    note = directory.with_name(f"{directory.name}.cost.json")
    if not note.is_file():
        words = [str(directory) if word == OUTPUT else word for word in command]
        cost = run(words, directory.with_name(f"{directory.name}.log"), HF_HUB_OFFLINE="1")
        spent = {"seconds": cost.seconds, "processor_seconds": cost.processor}
        spent["memory"] = cost.peak - import_baseline(command[0])
        write_bytes(note, json.dumps(spent).encode())
        print(name, json.dumps(spent), flush=True)
    found = next((path.parent for path in directory.rglob("config.json")), directory)
    return found, json.loads(note.read_text(encoding="utf-8"))


def _file_name(row: str) -> str:
    return row.replace(" ", "-").replace(",", "")


def measure(
    dense: Path, made: dict[str, Path], options: argparse.Namespace, result: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    """Perplexity and KL to the dense model of every row, by text."""
    found: dict[str, dict[str, Any]] = {name: {} for name in made}
    for text, windows in zip(options.evaluation, options.windows, strict=True):
        models = [dense, *made.values()]
        reference, *others = api.compare(models, data=text, windows=windows, length=options.evaluation_length)
        told = {"protocol": reference.protocol.sentence(), "dense_perplexity": reference.quality.perplexity}
        result.setdefault("texts", {})[Path(text).name] = told
        for name, other in zip(made, others, strict=True):
            quality = other.quality
            entry = {"perplexity": quality.perplexity, "kl": quality.kl, "top1": quality.top1}
            found[name][Path(text).name] = entry
    return found


if __name__ == "__main__":
    main()
