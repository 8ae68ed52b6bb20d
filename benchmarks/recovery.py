"""Recovery after removing blocks, and what the training loop costs beside a bare one.

    python benchmarks/recovery.py --training wiki.valid.raw --evaluation wiki.test.raw \\
        --output benchmarks/results/recovery.json

The same recipe twice, without and with `recover`, measured on the same windows. Steps of the loop and of a bare loop in
PyTorch, on the same model and batch, take turns; what is compared is the processor time of the fastest of each.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from penjing import api
from penjing.checkpoint import open_checkpoint
from penjing.evaluation.report import Software
from penjing.methods.training import NextToken, Training, TrainOptions
from penjing.training import Windows
from penjing.training.loop import _Loop
from penjing.training.models import load_model


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--training", required=True)
    parser.add_argument("--evaluation", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--drop", type=int, default=4)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch", type=int, default=2, help="windows per step")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {"software": Software.here().__dict__, "step": step_times(options)}
    options.output.write_text(json.dumps(found, indent=2) + "\n")
    found["recovery"] = recovery(options)
    options.output.write_text(json.dumps(found, indent=2) + "\n")
    print(json.dumps(found, indent=2))


def recovery(options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity and divergence of a model without some blocks, as it is and after training."""
    drop = {"method": "shortgpt", "drop": options.drop}
    recover = {
        "method": "recover",
        "steps": options.steps,
        "batch_size": options.batch,
        "micro_batch": options.batch,
        "learning_rate": options.learning_rate,
        "data": options.training,
        "samples": options.steps * options.batch,
        "length": options.length,
    }
    found: dict[str, Any] = {}
    for name, steps in {"dropped": [drop], "recovered": [drop, recover]}.items():
        recipe = {
            "version": 1,
            "steps": steps,
            "calibration": {"data": options.training, "samples": 16, "length": options.length},
            "evaluation": {"data": options.evaluation, "windows": 8, "length": 256},
            "format": "dense",
        }
        with tempfile.TemporaryDirectory() as folder:
            begin = time.process_time()
            report = api.compress(options.model, recipe, Path(folder) / "out")
            seconds = time.process_time() - begin
        assert report.quality is not None and report.protocol is not None
        found[name] = {
            "steps": steps,
            "perplexity": report.quality.perplexity,
            "dense_perplexity": report.quality.reference_perplexity,
            "kl": report.quality.kl,
            "protocol": report.protocol.sentence(),
            "processor_seconds": round(seconds, 1),
            "made": list(report.made),
        }
    return found


def step_times(options: argparse.Namespace, turns: int = 3) -> dict[str, Any]:
    """Processor seconds of a step of full training: the loop's and a bare one's, in turns."""
    model = load_model(open_checkpoint(options.model))
    bare = copy.deepcopy(model).requires_grad_(True)
    adam = torch.optim.AdamW(bare.parameters(), lr=1e-5, betas=(0.9, 0.95), fused=True)
    tokens = torch.randint(0, 1000, (options.batch, options.length))
    chosen = TrainOptions(
        steps=turns, batch_size=options.batch, micro_batch=options.batch, learning_rate=1e-5, save_every=turns
    )
    batches = Windows(tokens, options.batch, options.batch, 0)
    times: dict[str, list[float]] = {"loop": [], "bare": []}
    with tempfile.TemporaryDirectory() as folder:
        loop = _Loop(Training(model.requires_grad_(True), NextToken()), chosen, Path(folder), {})
        for turn in range(turns):
            begin = time.process_time()
            loop.step(turn, batches(turn))
            loop.optimizer.zero_grad(set_to_none=True)
            middle = time.process_time()
            bare(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
            torch.nn.utils.clip_grad_norm_(bare.parameters(), 1.0)
            adam.step()
            adam.zero_grad(set_to_none=True)
            times["loop"].append(middle - begin)
            times["bare"].append(time.process_time() - middle)
    best = {name: min(values) for name, values in times.items()}
    return {"tokens": tokens.numel(), "turns": turns, **best, "ratio": best["loop"] / best["bare"]}


if __name__ == "__main__":
    main()
