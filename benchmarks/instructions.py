"""Learning to answer: supervised training, GKD and MiniLLM, by reverse KL to the teacher on prompts held out.

    python benchmarks/instructions.py --data dolly.jsonl --work build/instructions \\
        --output benchmarks/results/instructions.json

A student with some of its teacher's layers is first trained on given answers for `--first` steps. From there, three
students go on for the same number of steps on the same prompts: on the given answers (supervised), with GKD, and with
MiniLLM. On held-out prompts each writes answers of its own; reverse KL is the mean over what it wrote of
KL(student || teacher) of the next-token distributions, and Rouge-L compares with the given answers. With
`--data self`, texts are written by the teacher, their first half is the prompt and the rest the answer.

A row that the output already holds is not run again; a killed one goes on from its last saved step.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch

from penjing.checkpoint import open_checkpoint
from penjing.evaluation.report import Software
from penjing.evaluation.windows import load_tokenizer
from penjing.methods.distillation import distil, on_policy
from penjing.methods.distillation.instructions import rouge_l
from penjing.methods.distillation.self_written import self_written
from penjing.methods.distillation.tokens import log_probabilities, predictions
from penjing.methods.training import IGNORED, NextToken, Training, TrainOptions, TrainTask
from penjing.models.reading import draw, end_tokens, write
from penjing.training import Pair, Pairs, read_pairs, train
from penjing.training.data import collate, padding_of
from penjing.training.models import load_model

PREAMBLE, ANSWER = "### Instruction:\n", "\n\n### Response:"
"""Around the instruction in files made for models without a chat template."""


def main() -> None:
    """Parse, run what is missing, write after every row."""
    options = _parsed()
    options.work.mkdir(parents=True, exist_ok=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    found = json.loads(options.output.read_text()) if options.output.is_file() else {}
    not_shown = ("output", "work", "label", "rows", "model", "data")
    setting = {key: value for key, value in vars(options).items() if key not in not_shown}
    mine = found.setdefault(options.label, {"setting": setting, "software": Software.here().__dict__, "rows": {}})
    teacher = load_model(open_checkpoint(options.model))
    tokenizer = load_tokenizer(open_checkpoint(options.model).files())
    pairs = _pairs(options, teacher, tokenizer)
    training, held_out = pairs[: -options.prompts], pairs[-options.prompts :]
    mine["protocol"] = f"{len(training)} pairs to train on, {len(held_out)} held out, at most {options.length} tokens"
    begun = _first(options, teacher, training, padding_of(tokenizer))
    for name in options.rows.split(","):
        if name not in mine["rows"]:
            student, seconds = _go_on(name, options, teacher, begun, training, padding_of(tokenizer))
            measured = measure(student, teacher, held_out, tokenizer, options)
            mine["rows"][name] = {**measured, "seconds": seconds}
            options.output.write_text(json.dumps(found, indent=2) + "\n")
        print(name, mine["rows"][name], flush=True)


def _parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--label", default="demo", help="what the rows are kept under")
    parser.add_argument("--data", required=True, help="records of prompts and responses, or `self`")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--first", type=int, default=24, help="steps on given answers before students part")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8, help="pairs per step")
    parser.add_argument("--length", type=int, default=96, help="tokens of a pair at most")
    parser.add_argument("--pairs", type=int, default=320, help="held out ones included")
    parser.add_argument("--prompts", type=int, default=32, help="held out")
    parser.add_argument("--new-tokens", type=int, default=32, help="that a student writes at most")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--rows", default="begun,supervised,gkd,minillm")
    return parser.parse_args()


def _pairs(options: argparse.Namespace, teacher: Any, tokenizer: Any) -> list[Pair]:
    if options.data == "self":
        tokens, labels = self_written(teacher, options.pairs, options.length, seed=0)
        answer = torch.arange(options.length) >= options.length // 2
        found = [Pair(row, answer & (label != IGNORED)) for row, label in zip(tokens, labels, strict=True)]
        return [pair for pair in found if bool(pair.learnt.any())]
    plain = options.work / "pairs.jsonl"
    if not plain.is_file():
        records = [json.loads(line) for line in Path(options.data).read_text(encoding="utf-8").splitlines()]
        lines = [json.dumps(record | {"prompt": _instruction(record["prompt"])}) for record in records]
        plain.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return read_pairs(plain, tokenizer, options.length, options.pairs)


def _instruction(prompt: str) -> str:
    """What was asked, without the words around it: the model's chat template has its own."""
    return prompt.partition(PREAMBLE)[2].partition(ANSWER)[0] or prompt


def _settings(options: argparse.Namespace, kind: Any = TrainOptions, **keys: Any) -> Any:
    common = {"batch_size": options.batch, "micro_batch": options.batch, "learning_rate": options.learning_rate}
    return kind(**{"steps": options.steps, "save_every": 8, **common, **keys})


def _first(options: argparse.Namespace, teacher: Any, pairs: list[Pair], padding: int) -> Any:
    """The student that the others begin from."""
    start = distil.DistilOptions(student={"layers": options.layers}).student
    assert start is not None
    student = distil.make_student(teacher, start).requires_grad_(True)
    settings = _settings(options, steps=options.first)
    batches = Pairs(pairs, padding, options.batch, options.batch, 0)
    with torch.enable_grad():
        train(Training(student, NextToken()), batches, settings, options.work / "first", marks={})
    return student


def _go_on(
    name: str, options: argparse.Namespace, teacher: Any, begun: Any, pairs: list[Pair], padding: int
) -> tuple[Any, float]:
    student = copy.deepcopy(begun).requires_grad_(False)
    if name == "begun":
        return student, 0.0
    task = TrainTask(student, lambda: teacher)
    new = {"new_tokens": options.new_tokens}
    if name == "gkd":
        settings = _settings(options, on_policy.GKDOptions, loss="reverse-kl", own=1.0, **new)
        training = on_policy.train_gkd(task, settings)
    elif name == "minillm":
        settings = _settings(options, on_policy.MiniLLMOptions, **new)
        training = on_policy.train_minillm(task, settings)
    else:
        settings = _settings(options)
        training = Training(student.requires_grad_(True), NextToken())
    batches = Pairs(pairs, padding, options.batch, options.batch, seed=1)
    with torch.enable_grad():
        curve = train(training, batches, settings, options.work / name, marks={})
    return student, round(sum(curve.seconds), 1)


@torch.no_grad()
def measure(
    student: Any, teacher: Any, held_out: list[Pair], tokenizer: Any, options: argparse.Namespace
) -> dict[str, float]:
    """Reverse and forward divergence on answers that the student draws, and Rouge-L of its likeliest answers."""
    torch.manual_seed(0)
    student.eval()
    reverse, forward, count, rouge = 0.0, 0.0, 0, 0.0
    for first in range(0, len(held_out), options.batch):
        some = held_out[first : first + options.batch]
        batch = collate(some, padding_of(tokenizer))
        prompts = on_policy.prompts_of(batch)
        ends = end_tokens(student)
        drawn = write([student], *prompts, options.new_tokens, lambda number, logits: draw(logits[0]), ends)
        own = on_policy.continued(*prompts, drawn)
        at, _ = predictions(own["labels"])
        inputs = {key: value for key, value in own.items() if key != "labels"}
        log_q, log_p = (log_probabilities(model(**inputs).logits[at]) for model in (student, teacher))
        reverse += float((log_q.exp() * (log_q - log_p)).sum())
        forward += float((log_p.exp() * (log_p - log_q)).sum())
        count += int(at.sum())
        best = write([student], *prompts, options.new_tokens, lambda number, logits: logits[0].argmax(-1), ends)
        for pair, tokens, mask in zip(some, best.tokens, best.mask, strict=True):
            answer = tokenizer.decode(tokens[mask], skip_special_tokens=True)
            rouge += rouge_l(answer, tokenizer.decode(pair.ids[pair.learnt], skip_special_tokens=True))
    return {
        "reverse_kl": round(reverse / count, 4),
        "forward_kl": round(forward / count, 4),
        "rouge_l": round(rouge / len(held_out), 4),
        "tokens": count,
    }


if __name__ == "__main__":
    main()
