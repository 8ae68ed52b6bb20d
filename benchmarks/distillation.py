"""A student of half its teacher's layers: does the teacher help, and does it help to begin with its layers?

    python benchmarks/distillation.py --training wiki.valid.raw --evaluation wiki.test.raw --layers 15 \\
        --output benchmarks/results/distillation.json

Every variant sees the same batches for the same number of steps, on the loop that recipes use; perplexity, divergence
from the teacher and agreement on the next token are measured on windows of another text. Students that the output
already holds are not trained again; one that was killed, or stopped after `--minutes`, continues from the last point
that `--work` keeps.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penjing.checkpoint import open_checkpoint
from penjing.evaluation.metrics import Comparison
from penjing.evaluation.report import Software
from penjing.evaluation.text import load_documents
from penjing.evaluation.windows import describe, evaluation_windows, leading_token, load_tokenizer
from penjing.methods.distillation import distil, on_policy
from penjing.methods.distillation.self_written import self_written
from penjing.methods.training import TrainTask
from penjing.training import Windows, train
from penjing.training.loop import STATE, Progress
from penjing.training.models import load_model

VARIANTS: dict[str, dict[str, Any]] = {
    "next token, layers of the teacher": {"alpha": 0.0},
    "teacher's logits, layers of the teacher": {},
    "teacher's logits, fresh weights": {"student": {"init": "random"}},
    "next token, fresh weights": {"alpha": 0.0, "student": {"init": "random"}},
    "logits and states, relative": {"hidden": 1.0, "states": "relative"},
    "states and attention first, then logits": {"hidden": 1.0, "attention": 0.01, "transfer_first": 0.4},
    "logits and relations": {"relations": 1.0, "relation_heads": 4},
    "reverse KL": {"loss": "reverse-kl"},
    "skewed reverse KL": {"loss": "skewed-reverse-kl"},
    "on what it writes (GKD)": {"own": 0.5, "new_tokens": 32},
}

SAVE_EVERY = 10
UNSAID = ("output", "variants", "work", "minutes")


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--training", default="builtin", help="text, or `self`: what the teacher writes")
    parser.add_argument("--evaluation", default="builtin")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=15)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=4, help="windows per step")
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--windows", type=int, default=16, help="that are measured on")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--variants", default="", help="their names, with `;` between  [all]")
    parser.add_argument("--work", type=Path, help="where unfinished trainings lie  [nowhere]")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so many")
    options = parser.parse_args()
    options.output.parent.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    teacher = load_model(open_checkpoint(options.model))
    texts = _texts(options, teacher)
    wanted = [name.strip() for name in options.variants.split(";") if name.strip()] or list(VARIANTS)
    found: dict[str, Any] = {
        "software": Software.here().__dict__,
        "setting": {key: Path(str(value)).name for key, value in vars(options).items() if key not in UNSAID},
        "protocol": texts["protocol"],
        "teacher": measure(teacher, teacher, texts["evaluation"]),
        "students": {},
    }
    found["untrained"] = measure(
        distil.make_student(teacher, distil.Student(layers=options.layers)), teacher, texts["evaluation"]
    )
    if options.output.is_file():
        before = json.loads(options.output.read_text())
        if before["setting"] != found["setting"]:
            raise SystemExit(f"{options.output} holds another setting: {before['setting']}")
        found["students"] = before["students"]

    def heed(stage: str, done: int, total: int, detail: str) -> None:
        if time.monotonic() - began > 60 * options.minutes and done % SAVE_EVERY == 0 and done < total:
            raise SystemExit(f"stopped after {done} of {total} steps; run the same command again")

    for name in wanted:
        if name not in found["students"]:
            found["students"][name] = one(name, teacher, texts, options, heed)
            options.output.write_text(json.dumps(found, indent=2) + "\n")
        print(name, found["students"][name], flush=True)


def _texts(options: argparse.Namespace, teacher: Any) -> dict[str, Any]:
    if options.training == "self":
        training, _ = self_written(teacher, options.steps * options.batch, options.length, seed=0)
        evaluation, _ = self_written(teacher, options.windows, options.length, seed=1)
        return {"training": training, "evaluation": evaluation, "protocol": "text written by the teacher"}
    tokenizer = load_tokenizer(open_checkpoint(options.model).files())
    bos = leading_token(tokenizer)
    documents = load_documents(options.training, "calibration")
    training = evaluation_windows(
        documents, tokenizer, windows=options.steps * options.batch, length=options.length, bos=bos
    )
    documents = load_documents(options.evaluation, "evaluation")
    evaluation = evaluation_windows(documents, tokenizer, windows=options.windows, length=options.length, bos=bos)
    return {
        "training": training,
        "evaluation": evaluation,
        "protocol": describe(documents, evaluation, bos=bos).sentence(),
    }


def one(
    name: str, teacher: Any, texts: dict[str, Any], options: argparse.Namespace, heed: Progress
) -> dict[str, float]:
    """Train one student and measure it. What is trained on its own writing begins as a student of logits did."""
    keys = dict(VARIANTS[name])
    shape = {"layers": options.layers, **keys.pop("student", {})}
    common = {
        "steps": options.steps,
        "batch_size": options.batch,
        "micro_batch": options.batch,
        "learning_rate": options.learning_rate,
        "save_every": SAVE_EVERY,
    }
    if "own" in keys:
        settings: Any = on_policy.GKDOptions(**keys, **common)
        model = distil.make_student(teacher, distil.Student(**shape))
        training = on_policy.train_gkd(TrainTask(model, lambda: teacher), settings)
    else:
        settings = distil.DistilOptions(student=shape, **keys, **common)
        training = distil.train(TrainTask(teacher, lambda: teacher), settings)
    windows = Windows(texts["training"], options.batch, options.batch, 0)
    with tempfile.TemporaryDirectory() as folder, torch.enable_grad():
        work = (options.work or Path(folder)) / name.replace(" ", "-")
        curve = train(training, windows, settings, work, marks={}, progress=heed)
        (work / STATE).unlink()
    return {**measure(training.model, teacher, texts["evaluation"]), "seconds": round(sum(curve.seconds), 1)}


@torch.no_grad()
def measure(model: Any, teacher: Any, windows: Tensor) -> dict[str, float]:
    """Perplexity, and KL and agreement against the teacher."""
    model.eval()
    comparison = Comparison()
    for window in windows:
        ids = window[None]
        comparison.update(model(ids).logits[0, :-1], window[1:], teacher(ids).logits[0, :-1])
    result = comparison.result()
    assert result.perplexity is not None and result.kl is not None and result.top1 is not None
    return {"perplexity": round(result.perplexity, 3), "kl": round(result.kl, 4), "top1": round(result.top1, 4)}


if __name__ == "__main__":
    main()
