"""GPTQ by Penjing and by llmcompressor: same model, same windows, same two cores, one after the other in one run.

    python benchmarks/gptq_speed.py --calibration wiki.valid.raw --evaluation wiki.test.raw \\
        --peer-python PEER/bin/python --work build/gptq_speed --output benchmarks/results/gptq_speed.json

What was run stays in the working directory with its cost (`costs.json`), so that an interrupted benchmark goes on.

The peer lives in an environment of its own (`pip install torch==2.13.0 llmcompressor==0.14.0`). Time is wall clock
from start of the process to the files on disk; memory is the peak of the process above one that only imports torch and
transformers. Both results are then measured by the same code.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from measured import import_baseline, run
from safetensors.torch import save_file

from penjing import api
from penjing.checkpoint import open_checkpoint, write_bytes, write_shard
from penjing.evaluation.report import Software
from penjing.pipeline.text import TextSource
from penjing.recipe import Calibration

HERE = Path(__file__).parent
SEARCHED = {"scale_rule": "signed-max", "scale_search": "diagonal"}
"""What Penjing offers beyond the peer's settings, in the same number of bytes."""


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--peer-dtypes", nargs="+", default=["bfloat16", "float32"])
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)

    dense = write_dense(options.work / "dense")
    text = TextSource(open_checkpoint(dense))
    calibration = text.calibration(
        Calibration(data=options.calibration, samples=options.samples, length=options.length)
    )
    save_file({"tokens": calibration.tokens}, options.work / "tokens.safetensors")

    jobs = {"penjing": partial(ours, dense, {}, options)}
    jobs |= {"penjing, searched scales": partial(ours, dense, SEARCHED, options)}
    jobs |= {f"llmcompressor {dtype}": partial(peer, dense, dtype, options) for dtype in options.peer_dtypes}
    costs = options.work / "costs.json"
    runs: dict[str, Any] = json.loads(costs.read_text()) if costs.is_file() else {}
    for name in [name for name in jobs if name not in runs]:
        runs[name] = jobs[name]()
        write_bytes(costs, json.dumps(runs).encode())
    models = [str(dense), *(entry["directory"] for entry in runs.values())]
    measured = api.compare(models, data=options.evaluation, windows=options.windows)
    for entry, quality in zip(runs.values(), measured[1:], strict=True):
        entry |= {"bytes": quality.bytes, "perplexity": quality.quality.perplexity, "kl": quality.quality.kl}
        del entry["directory"]
    result = {
        "settings": f"GPTQ W4 symmetric g64, {calibration.protocol.sentence()}",
        "evaluation": measured[0].protocol.sentence(),
        "dense_perplexity": measured[0].quality.perplexity,
        "software": Software.here().__dict__,
        "runs": runs,
        "ratios": {
            our: {name: ratios(runs[our], entry) for name, entry in runs.items() if not name.startswith("penjing")}
            for our in runs
            if our.startswith("penjing")
        },
    }
    write_bytes(options.output, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result, indent=1))


def write_dense(directory: Path) -> Path:
    """The demo model as a bf16 Hugging Face directory, for tools that do not read GGUF."""
    import torch

    if not (directory / "config.json").is_file():
        checkpoint = open_checkpoint("demo")
        tensors = {name: checkpoint.load(name).to(torch.bfloat16) for name in checkpoint.specs()}
        write_shard(directory / "model.safetensors", tensors)
        for name, content in checkpoint.files():
            write_bytes(directory / name, content)
        write_bytes(directory / "config.json", json.dumps(checkpoint.config).encode())
    return directory


def ours(dense: Path, more: dict[str, str], options: argparse.Namespace) -> dict[str, Any]:
    """`penjing compress` as a user runs it, without the evaluation."""
    directory = options.work / ("penjing-searched" if more else "penjing")
    shutil.rmtree(directory, ignore_errors=True)
    recipe = {
        "version": 1,
        "steps": [{"method": "gptq", "bits": 4, "group_size": 64, **more}],
        "calibration": {"data": options.calibration, "samples": options.samples, "length": options.length},
    }
    write_bytes(options.work / "recipe.yaml", yaml.safe_dump(recipe).encode())
    command = [sys.executable, "-m", "penjing", "compress", str(dense), "-r", str(options.work / "recipe.yaml")]
    cost = run([*command, "-o", str(directory), "--no-eval"], directory.with_suffix(".log"))
    stages = json.loads((directory / "report.json").read_text())["seconds"]
    return {
        "directory": str(directory),
        "seconds": cost.seconds,
        "stages": stages,
        "memory": cost.peak - import_baseline(),
    }


def peer(dense: Path, dtype: str, options: argparse.Namespace) -> dict[str, Any]:
    """llmcompressor's oneshot on the same windows."""
    directory = options.work / f"llmcompressor-{dtype}"
    command = [options.peer_python, str(HERE / "peer_llmcompressor.py"), str(dense)]
    command += [str(options.work / "tokens.safetensors"), str(directory), "4", "64", dtype, "gptq"]
    cost = run(command, options.work / f"llmcompressor-{dtype}.log", HF_HUB_OFFLINE="1")
    return {
        "directory": str(directory),
        "seconds": cost.seconds,
        "memory": cost.peak - import_baseline(options.peer_python),
    }


def ratios(our: dict[str, Any], their: dict[str, Any]) -> dict[str, float]:
    """How many times faster, smaller in memory, and better."""
    return {key: their[key] / our[key] for key in ("seconds", "memory", "perplexity", "kl")}


if __name__ == "__main__":
    main()
