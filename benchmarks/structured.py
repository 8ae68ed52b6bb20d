"""A fifth and three tenths of all parameters removed: Penjing's steps and its peers, then the same recovery for all.

    python benchmarks/structured.py --calibration wiki.valid.raw --evaluation wiki.test.raw --llm-pruner CHECKOUT \\
        --work build/structured --output benchmarks/results/structured.json

Every row leaves at most the same number of parameters, sees the same windows, is recovered by the same loop with the
same batches in the same order, and is measured by the same code. The peers are Torch-Pruning (`peer_torch_pruning.py`)
and LLM-Pruner's code (`peer_llm_pruner.py`), run on the same checkpoint. What was made before lies in the work folder
and is not made again; what was measured stays in the output.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gptq_speed import write_dense
from measured import run
from safetensors.torch import save_file

from penjing import api
from penjing.checkpoint import open_checkpoint, write_bytes
from penjing.evaluation.questions import TaskScore
from penjing.evaluation.report import Software
from penjing.methods.adaptation import recover
from penjing.pipeline.text import TextSource
from penjing.recipe import Calibration
from penjing.training.stage import TrainStage

HERE = Path(__file__).parent
SIZES = {"20 %": 0.2, "30 %": 0.3}
OURS: dict[str, list[dict[str, Any]]] = {
    "penjing neurons": [{"method": "neurons"}],
    "penjing neurons, no refit": [{"method": "neurons", "refit": False}],
    "penjing neurons, obs": [{"method": "neurons", "score": "obs"}],
    "penjing heads, then neurons": [{"method": "heads", "sparsity": 0.34}, {"method": "neurons"}],
    "penjing llm-pruner": [{"method": "llm-pruner"}],
}
"""The last step gets the number of parameters."""
PEERS = {
    "torch-pruning, magnitude": ("peer_torch_pruning.py", "magnitude"),
    "torch-pruning, taylor": ("peer_torch_pruning.py", "taylor"),
    "llm-pruner": ("peer_llm_pruner.py", ""),
}
ROWS = [f"{name}, {size}" for size in SIZES for name in (*OURS, *PEERS)]


def main() -> None:
    """Parse, make what is missing, measure it, write."""
    options = parse()
    options.work.mkdir(parents=True, exist_ok=True)
    dense = write_dense(options.work / "dense") if options.model == "demo" else Path(options.model)
    result: dict[str, Any] = {"model": Path(options.model).name, "runs": {}}
    if options.output.is_file():
        result = json.loads(options.output.read_text(encoding="utf-8"))
    text = TextSource(open_checkpoint(dense)).calibration(
        Calibration(data=options.calibration, samples=options.samples, length=options.length)
    )
    if not (options.work / "tokens.safetensors").is_file():
        save_file({"tokens": text.tokens}, options.work / "tokens.safetensors")
    result["calibration"] = text.protocol.sentence()
    made: dict[str, Path] = {}
    for name in options.only:
        cut = make(name, dense, options)
        made[name] = cut
        if options.steps:
            made[f"{name}, recovered"] = recovered(cut, dense, options)
            result["recovery"] = f"{options.steps} steps of {options.batch} windows of {options.recovery_length} tokens"
        print(name, "made", flush=True)
    missing = {name: directory for name, directory in made.items() if name not in result["runs"]}
    if missing and not options.unmeasured:
        measure(missing, dense, options, result)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="`demo` or a checkpoint of the Llama family")
    parser.add_argument("--calibration", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--llm-pruner", default="", help="a clone of github.com/horseee/LLM-Pruner")
    parser.add_argument("--whole", nargs=2, default=["4", "1"], help="first and last blocks LLM-Pruner leaves alone")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--evaluation-length", type=int, default=512)
    parser.add_argument("--steps", type=int, default=32, help="of recovery; 0: none")
    parser.add_argument("--batch", type=int, default=2, help="windows per step")
    parser.add_argument("--recovery-length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--tasks", nargs="*", default=[], help="questions asked too: .jsonl files or tasks of lm-eval")
    parser.add_argument("--limit", type=int, default=200, help="questions of each task")
    parser.add_argument("--unmeasured", action="store_true", help="make the models only")
    parser.add_argument("--only", nargs="*", default=ROWS)
    return parser.parse_args()


def make(name: str, dense: Path, options: argparse.Namespace) -> Path:
    """The cut model of a row."""
    directory: Path = options.work / name.replace(" ", "-").replace(",", "").replace("%", "percent")
    if (directory / "config.json").is_file():
        return directory
    kind, _, size = name.rpartition(", ")
    parameters = int(api.inspect(dense).layout.parameters * (1 - SIZES[size]))
    if kind in PEERS:
        script, criterion = PEERS[kind]
        command = [sys.executable, str(HERE / script), str(dense), str(options.work / "tokens.safetensors")]
        last = [criterion] if criterion else [options.llm_pruner, *options.whole]
        run([*command, str(directory), str(parameters), *last], options.work / "peer.log")
        return directory
    *before, last = OURS[kind]
    recipe = {
        "version": 1,
        "steps": [*before, {**last, "params": parameters}],
        "calibration": {"data": options.calibration, "samples": options.samples, "length": options.length},
        "format": "dense",
    }
    api.compress(dense, recipe, directory, evaluated=False)
    return directory


def recovered(cut: Path, dense: Path, options: argparse.Namespace) -> Path:
    """The same model after training: low-rank changes towards the dense model's logits; what is zero stays zero."""
    directory = cut.with_name(f"{cut.name}-recovered")
    if (directory / "config.json").is_file():
        return directory
    source = open_checkpoint(cut)
    chosen = recover.RecoverOptions(
        steps=options.steps,
        batch_size=options.batch,
        micro_batch=options.batch,
        learning_rate=options.learning_rate,
        data=options.calibration,
        length=options.recovery_length,
        save_every=options.steps,
    )
    stage = TrainStage(source, open_checkpoint(dense), torch.zeros(1, 2), source.config, torch.float32)
    stage.run("recover", recover.train, chosen, directory, cut.with_name(f"{cut.name}-training"))
    return directory


def measure(missing: dict[str, Path], dense: Path, options: argparse.Namespace, result: dict[str, Any]) -> None:
    """Perplexity and KL to the dense model, answers to questions; parameters that are not zero."""
    compared = api.compare(
        [dense, *missing.values()],
        data=options.evaluation,
        windows=options.windows,
        length=options.evaluation_length,
        tasks=options.tasks,
        limit=options.limit if options.tasks else None,
    )
    result["evaluation"] = compared[0].protocol.sentence()
    result["dense"] = result.get("dense", {}) | {
        "parameters": parameters_of(dense),
        "perplexity": compared[0].quality.perplexity,
        **answers(compared[0].tasks),
    }
    for (name, directory), found in zip(missing.items(), compared[1:], strict=True):
        quality = found.quality
        result["runs"][name] = {
            "parameters": parameters_of(directory),
            "perplexity": quality.perplexity,
            "kl": quality.kl,
            "top1": quality.top1,
            **answers(found.tasks),
        }
        print(name, json.dumps(result["runs"][name]), flush=True)
    result["software"] = Software.here().__dict__
    write_bytes(options.output, (json.dumps(result, indent=1) + "\n").encode())


def answers(scores: Sequence[TaskScore]) -> dict[str, dict[str, float]]:
    """Share of right answers by task; nothing where nothing was asked."""
    found = {f"{score.name}, {score.questions} questions": score.value for score in scores if score.metric == "acc"}
    return {"accuracy": found} if found else {}


def parameters_of(directory: Path) -> int:
    """Numbers in the checkpoint that are not zero."""
    checkpoint = open_checkpoint(directory)
    return sum(int(checkpoint.load(name).count_nonzero()) for name in checkpoint.specs())


if __name__ == "__main__":
    main()
