"""Fill the marked tables of docs/guides from benchmarks/results.

python scripts/result_tables.py           write the tables
python scripts/result_tables.py --check   fail when a page differs from what would be written
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "guides"
RESULTS = ROOT / "benchmarks" / "results"
MARKED = re.compile(r"<!-- table:(\w+) -->.*?<!-- /table -->", re.DOTALL)
RECOVERED = ", recovered"
MODELS = {
    "demo": "SmolLM2-135M",
    "stories260K": "stories260K, a Llama of 260,032 parameters (karpathy/tinyllamas), on stories that it wrote itself",
}


def masks(found: dict[str, Any]) -> list[str]:
    """Perplexity by mask (rows) and sparsity (columns)."""
    runs, cells = found["runs"], {}
    for name, run in runs.items():
        split = re.fullmatch(r"(.+) (\d+ %)(.*)", name)
        assert split is not None, name
        cells[split[1] + split[3], split[2]] = _perplexity(run)
    sizes = sorted({size for _, size in cells})
    lines = _table(
        ["perplexity", *sizes],
        [
            [method, *(cells.get((method, size), "") for size in sizes)]
            for method in dict.fromkeys(row for row, _ in cells)
        ],
    )
    dense = f"Dense: {found['dense_perplexity']:.2f}."
    return [*lines, "", f"{dense} Calibration: {found['calibration']}. Evaluation: {found['evaluation']}."]


def removed(found: dict[str, Any]) -> list[str]:
    """Perplexity and KL after removal and after recovery, and what the recovered answer where they were asked."""
    runs, dense = found["runs"], found["dense"]
    asked = dense.get("accuracy", {})

    def answers(run: dict[str, Any]) -> list[str]:
        return [f"{run['accuracy'][task]:.1%}" if "accuracy" in run else "" for task in asked]

    rows = [["dense", f"{dense['parameters']:,}", f"{dense['perplexity']:.2f}", "", *answers(dense)]]
    cuts = [name for name in runs if not name.endswith(RECOVERED)]
    for name in sorted(cuts, key=lambda name: name.rpartition(", ")[2]):
        cut, after = runs[name], runs.get(name + RECOVERED, {})
        pairs = [f"{_perplexity(run)}, {run['kl']:.3f}" if run else "" for run in (cut, after)]
        rows.append([name, f"{cut['parameters']:,}", *pairs, *answers(after)])
    head = ["what removes, of all parameters", "parameters left", "perplexity, KL", "after recovery", *asked]
    trained = f" Recovery: {found['recovery']}." if "recovery" in found else ""
    said = f"Calibration: {found['calibration']}.{trained} Evaluation: {found['evaluation']}."
    return [*_table(head, rows), "", said]


def decode(found: dict[str, Any]) -> list[str]:
    """Tokens per second of the cut models beside the dense one."""
    rows = [
        [name, f"{row['parameter_ratio']:.2f}", f"{row['speedup']:.2f}"] for name, row in sorted(found["cut"].items())
    ]
    head = ["model", "times fewer parameters", "times as fast"]
    return [*_table(head, rows), "", f"Measured in {found['protocol']}; {found['software']['cpu']}."]


def chain(found: dict[str, Any]) -> list[str]:
    """One recipe, step after step."""
    rows = [["dense", f"{found['dense']['perplexity']:.2f}", "", ""]]
    rows += [[name, _perplexity(run), f"{run['kl']:.3f}", f"{run['bytes']:,}"] for name, run in found["runs"].items()]
    said = f"Calibration: {found['calibration']}. Recovery: {found['recovery']}. Evaluation: {found['evaluation']}."
    return [*_table(["model", "perplexity", "KL", "bytes of weights"], rows), "", said]


def equal_size(found: dict[str, Any]) -> list[str]:
    """Low rank, weight sharing, embeddings and hybrids: what is left at which size."""
    rows = [
        [
            name,
            f"{run['bits_per_weight']:.2f}" if run["bits_per_weight"] else "",
            f"{run['file_bytes'] / 1e6:.1f} MB",
            _perplexity(run),
            f"{run['kl']:.3f}",
        ]
        for name, run in sorted(found["runs"].items(), key=lambda row: -row[1]["file_bytes"])
    ]
    dense = f"Dense: {found['dense_perplexity']:.2f}."
    head = ["recipe", "bits per changed weight", "bytes of the model", "perplexity", "KL"]
    return [*_table(head, rows), "", f"{dense} {_texts(found)}"]


def mixtures(found: dict[str, Any]) -> list[str]:
    """One choice for all linears, and the mixture of all choices in the same bytes."""
    rows = [[name, f"{run['bytes']:,}", _perplexity(run), f"{run['kl']:.3f}"] for name, run in found["runs"].items()]
    made = [
        f"{name}: " + ", ".join(f"{count} of {choice}" for choice, count in counts.items())
        for name, counts in found["mixtures"].items()
        if f"{name} everywhere" in found["runs"]
    ]
    first = next(iter(found["runs"].values()))
    said = f"Dense: {found['dense_perplexity']:.2f}. Units of each choice in the mixtures: {'; '.join(made)}."
    return [*_table(["choice", "bytes", "perplexity", "KL"], rows), "", f"{said} {_texts(found | first)}"]


def products(found: dict[str, Any]) -> list[str]:
    """Matrix times vector in formats of few bits: how many times as fast as with dense bf16 weights."""
    shapes = {f"{shape} ({size})": row for size, rows in found["linears"].items() for shape, row in rows.items()}
    forms = [form for form in next(iter(shapes.values())) if form != "bf16"]
    rows = [
        [form, *(f"{row[form]['times_as_fast_as_bf16']:.1f}" if form in row else "" for row in shapes.values())]
        for form in forms
    ]
    threads = found["hardware"]["threads"]
    said = (
        f"Fastest of {found['rounds']} rounds, {threads} thread{'s' * (threads > 1)}, {found['hardware']['processor']}."
    )
    return [*_table(["weights", *shapes], rows), "", said]


def students(found: dict[str, Any]) -> list[str]:
    """Distilled students: perplexity, divergence from the teacher, agreement with it."""
    rows = [
        [name, f"{row['perplexity']:,.2f}", f"{row['kl']:.3f}", f"{row['top1']:.3f}"]
        for name, row in sorted(found["students"].items(), key=lambda row: row[1]["kl"])
    ]
    setting = found["setting"]
    said = (
        f"{setting['layers']} layers, {setting['steps']} steps of {setting['batch']} x {setting['length']} tokens. "
        f"Teacher: perplexity {found['teacher']['perplexity']:.2f}. Evaluation: {found['protocol']}."
    )
    title = f"**{MODELS.get(setting['model'], setting['model'])}**"
    return [title, "", *_table(["student", "perplexity", "KL", "same next token"], rows), "", said]


def classifiers(found: dict[str, Any]) -> list[str]:
    """A classifier and its students: size and accuracy, absolute and as a share of the teacher's."""
    rows = [
        [name, f"{row['parameters']:,}", f"{row['share']:.0%}", f"{row['accuracy']:.1%}", f"{row['of_teacher']:.1%}"]
        for name, row in found["models"].items()
    ]
    head = ["model", "parameters", "of the teacher's parameters", "accuracy", "of the teacher's accuracy"]
    return [*_table(head, rows), "", f"Evaluation: {found['protocol']}."]


def answers(found: dict[str, Any]) -> list[str]:
    """Students of instructions: divergence on what they write themselves, and overlap with given answers."""
    found = found["demo"]
    rows = [
        [name, f"{row['reverse_kl']:.3f}", f"{row['forward_kl']:.3f}", f"{row['rouge_l']:.3f}"]
        for name, row in found["rows"].items()
    ]
    setting = found["setting"]
    said = (
        f"{setting['layers']} of the teacher's layers; {setting['first']} steps on given answers, then "
        f"{setting['steps']} of {setting['batch']} pairs; learning rate {setting['learning_rate']:g}; "
        f"{found['protocol']}."
    )
    return [*_table(["student", "reverse KL", "forward KL", "Rouge-L"], rows), "", said]


def taught(found: dict[str, Any]) -> list[str]:
    """Ways to teach a domain: what is stored, what it took, perplexity there."""
    found = found["demo"]["adapters"]

    def cell(row: dict[str, Any], key: str, unit: float, form: str) -> str:
        return format(row[key] / unit, form) if key in row else ""

    rows = [
        [
            name,
            cell(row, "weights_bytes", 1e6, ".1f"),
            cell(row, "task_bytes", 1e6, ".2f"),
            cell(row, "peak_above_libraries_bytes", 1e6, ".0f"),
            f"{row['perplexity']:.2f}",
        ]
        for name, row in found["rows"].items()
    ]
    head = ["model", "MB of the model", "MB of the task", "MB of memory while training", "perplexity"]
    setting = found["setting"]
    said = (
        f"Rank {setting['rank']}, {setting['steps']} steps of {setting['batch']} x {setting['length']} tokens. "
        f"Evaluation: {found['protocol']}."
    )
    return [*_table(head, rows), "", said]


def rounded(found: dict[str, Any]) -> list[str]:
    """What training with rounded weights, inputs and cache gives back."""
    found = found["demo"]["qat"]
    rows = [[name, f"{row['perplexity']:.2f}", f"{row['kl']:.3f}"] for name, row in found["rows"].items()]
    setting = found["setting"]
    said = (
        f"{setting['steps']} steps of {setting['batch']} windows of {setting['length']} tokens that the model wrote, "
        f"learning rate {setting['learning_rate']:g}. Evaluation: {found['protocol']}."
    )
    return [*_table(["model", "perplexity", "KL"], rows), "", said]


def peers(found: dict[str, Any]) -> list[str]:
    """Penjing's recipes and its peers at the same bits, on every text."""
    texts = list(found["texts"])
    rows = [
        [
            *name.rsplit(", ", 1)[::-1],
            *(f"{run['texts'][text]['kl']:.3f}, {_perplexity(run['texts'][text])}" for text in texts),
            f"{run['processor_seconds']:.0f}",
            f"{run['memory'] / 1e9:.2f}",
        ]
        for name, run in sorted(
            found["runs"].items(), key=lambda row: (-int(row[0].split()[-2]), row[1]["texts"][texts[0]]["kl"])
        )
    ]
    heads = [f"KL, perplexity ({text.removesuffix('.raw').removesuffix('.jsonl.gz')})" for text in texts]
    dense = ", ".join(f"{told['dense_perplexity']:.2f}" for told in found["texts"].values())
    said = [f"Dense: perplexity {dense}. Calibration: {found['calibration']}."]
    said += [f"{name}: {told['protocol']}." for name, told in found["texts"].items()]
    head = ["weights", "made by", *heads, "seconds of a processor", "GB above the libraries"]
    return [*_table(head, rows), "", " ".join(said)]


def _texts(found: dict[str, Any]) -> str:
    return f"Calibration: {found['calibration']}. Evaluation: {found['evaluation']}."


TABLES = {
    "masks": (masks, ("pruning", "pruning_stories")),
    "removed": (removed, ("structured", "structured_stories")),
    "decode": (decode, ("cut_decode",)),
    "chain": (chain, ("chain", "chain_stories")),
    "equal_size": (equal_size, ("low_rank",)),
    "mixtures": (mixtures, ("allocation",)),
    "products": (products, ("binary_gemv",)),
    "peers": (peers, ("quality",)),
    "students": (students, ("distillation", "distillation_stories")),
    "classifiers": (classifiers, ("encoders",)),
    "answers": (answers, ("instructions",)),
    "taught": (taught, ("tuning",)),
    "rounded": (rounded, ("tuning",)),
}
"""Mark in a page -> how a file of benchmarks/results is shown, and which files are, where they are there."""


def _perplexity(run: dict[str, Any]) -> str:
    return f"{run['perplexity']:,.2f}" if run["perplexity"] < 10**5 else f"{run['perplexity']:.0e}"


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


def filled(page: str) -> str:
    """The page with every table made anew."""

    def body(match: re.Match[str]) -> str:
        show, names = TABLES[match[1]]
        lines: list[str] = []
        for path in (RESULTS / f"{name}.json" for name in names):
            if path.is_file():
                found = json.loads(path.read_text(encoding="utf-8"))
                title = ["", f"**{MODELS[found['model']]}**"] if "model" in found else []
                lines += [*title, "", *show(found)]
        return "\n".join([f"<!-- table:{match[1]} -->", *lines, "", "<!-- /table -->"])

    return MARKED.sub(body, page)


def main() -> None:
    """Write, or check."""
    for path in sorted(PAGES.glob("*.md")):
        page = path.read_text(encoding="utf-8")
        wanted = filled(page)
        if "--check" not in sys.argv:
            path.write_text(wanted, encoding="utf-8")
        elif page != wanted:
            sys.exit(f"{path.name} does not show what benchmarks/results holds: run scripts/result_tables.py")


if __name__ == "__main__":
    main()
