"""Try models in engines, keep what came out in src/penjing/engines/truth.json, and write docs/engines.md from it.

python scripts/truth.py                              every tiny architecture in every engine that is installed
python scripts/truth.py --architectures llama gpt2   some of them
python scripts/truth.py --again                      also what is on file for the engine's version
python scripts/truth.py --demo                       the demo model, timed against dense fp32 in transformers
python scripts/truth.py --page                       only write the page; --check fails when it differs

What is on file for the version of an engine that is installed is not tried again unless asked for, so that a run that
was interrupted goes on. Nothing is edited by hand.

One tiny model may hold several schemes, as GGUF's types do, linear by linear: then each of them gets the fact.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import penjing  # noqa: E402
from penjing.engines import ENGINES  # noqa: E402
from penjing.engines.bench import Load  # noqa: E402
from penjing.engines.truth import FILE, Fact, known  # noqa: E402
from penjing.errors import EngineError, MissingDependency, PenjingError, PlanError, VerificationError  # noqa: E402
from penjing.formats import FORMATS  # noqa: E402
from penjing.models import layout_of  # noqa: E402
from tiny_models import FAMILIES, build, piece_tokenizer  # noqa: E402

DATA = ROOT / "src/penjing/engines" / FILE
PAGE = ROOT / "docs/engines.md"

Steps = list[dict[str, Any]]
Known = dict[tuple[str, str, str, str], Fact]

STEPS: Mapping[str, Steps] = {
    "dense": [{"method": "magnitude", "sparsity": 0.5}],
    "compressed-tensors": [
        {"method": "rtn", "bits": 4, "group_size": 32},
        {"method": "rtn", "bits": 8, "group_size": -1, "activations": {"bits": 8}},
    ],
    "bitsandbytes": [{"method": "rtn", "type": "nf4", "group_size": 64}, {"method": "llm-int8"}],
    "native": [
        {"method": "rtn", "bits": 4, "group_size": 32},
        {"method": "rtn", "bits": 8, "group_size": -1, "activations": {"bits": 8}},
    ],
    "gptq": [{"method": "rtn", "bits": 4, "group_size": 32}],
    "awq": [{"method": "rtn", "bits": 4, "group_size": 32, "symmetric": False}],
    "gguf": [{"method": "rtn", "type": name} for name in ("q8_0", "q4_0", "q4_1")],
    "onnx": [{"method": "rtn", "bits": 4, "group_size": 32}, {"method": "rtn", "bits": 8, "group_size": 32}],
}
"""What is tried in each format; one that a format or a shape refuses is no fact about an engine and is left out."""

TYPES = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl", "mxfp4")
SUPER_BLOCKS = ("q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "tq2_0", "tq1_0")
"""Types of GGUF, of which a tiny model holds all of a row: linear by linear, those that fit its width."""

WIDE = 256
"""Inner width of tiny models: their second feed-forward linear has rows of whole super-blocks."""

OPTIONS: Mapping[str, dict[str, Any]] = {
    "mistral": {"sliding_window": None},
    "gemma3": {"layers": 12, "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2},
}
"""What a tiny model needs so that engines which know one shape of its architecture can run it."""

PIECES = ("gemma2", "gemma3")
"""Architectures whose tokenizer is not byte-level; readers of GGUF go by the architecture."""

INTRODUCTION = (
    "`penjing verify DIR --engine ENGINE` compares an engine's logits with what Penjing computes in fp32 from the same "
    "weights; `penjing bench` measures speed and memory; `penjing plan --engine ENGINE` uses the table below to warn "
    "or to refuse. An engine without a line was not tried: vLLM and `llama-server` are driven by their public "
    "interfaces, and nothing was measured in them."
)

PROTOCOL = (
    "Tiny random models of each architecture, types of GGUF several to a file, and the demo model where speed is "
    "given: tokens per second over those of the dense fp32 model in transformers, medians of alternating runs at batch "
    "1, 128 tokens of prompt. KL is that of the engine's arithmetic, not of the compression."
)


def main() -> int:
    """Parse, try, keep, write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=list(FAMILIES), choices=FAMILIES)
    parser.add_argument("--formats", nargs="+", default=[name for name in STEPS if name in FORMATS])
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--page", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    facts = {fact.key: fact for fact in known()}
    if not (options.page or options.check):
        before: Known = {} if options.again else dict(facts)
        tried = _demo(options.formats) if options.demo else _tiny(options.architectures, options.formats, before)
        for fact in tried:
            print(fact, file=sys.stderr)
            facts[fact.key] = fact
            rows = [json.dumps(facts[key].as_dict()) for key in sorted(facts)]
            DATA.write_text("[\n " + ",\n ".join(rows) + "\n]\n", encoding="utf-8")
    text = page(list(facts.values()))
    if options.check:
        return int(PAGE.read_text(encoding="utf-8") != text)
    PAGE.write_text(text, encoding="utf-8")
    return 0


def _tiny(architectures: list[str], formats: list[str], before: Known) -> Iterator[Fact]:
    """Tiny random models, tied and not as is the family's habit: does it load, are the logits right?"""
    with tempfile.TemporaryDirectory() as folder:
        for place, name in enumerate(architectures):  # llama.cpp expects certain tokens of what is called phi3
            options = {"layers": 8, **OPTIONS.get(name, {})}
            model = build(name, Path(folder) / f"model-{place}", inner=WIDE, calm=True, **options)
            if name in PIECES:
                piece_tokenizer().save_pretrained(model)
            for format in formats:
                for number, steps in enumerate(_trials(model, format)):
                    output = Path(folder) / f"{name}-{format}-{number}"
                    yield from _try_all(model, format, steps, output, before)


def _trials(model: Path, format: str) -> list[Steps]:
    """The recipes to try: a step each, or the types of GGUF in turn over the linears that they fit."""
    if format != "gguf":
        return [[step] for step in STEPS[format]]
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    linears = [module for module in layout_of(config).modules if module.kind == "linear"]
    wide = [module for module in linears if module.shape[1] % WIDE == 0]
    return [
        [
            {"method": "rtn", "type": kind, "targets": [module.name for module in fitting[number :: len(kinds)]]}
            for number, kind in enumerate(kinds)
        ]
        for kinds, fitting in ((TYPES, linears), (SUPER_BLOCKS, wide))
    ]


def _try_all(model: Path, format: str, steps: Steps, output: Path, before: Known) -> Iterator[Fact]:
    """A fact for each scheme and engine, where recipe and shape allow the model and not all is known."""
    recipe = {"steps": steps, "format": format, "on_unsupported": "error"}
    with suppress(PlanError, MissingDependency):
        schemes = {module["scheme"] for module in penjing.plan(model, recipe).as_dict()["modules"]} - {"dense"}
        architecture = json.loads((model / "config.json").read_text(encoding="utf-8"))["model_type"]
        missing = {}
        for engine in _installed(format):
            facts = [before.get((engine, architecture, format, scheme)) for scheme in schemes]
            if any(fact is None or fact.version != ENGINES[engine].version() for fact in facts):
                missing[engine] = sorted(schemes)
        if missing:
            penjing.compress(model, recipe, output, evaluated=False)
        for engine, wanted in missing.items():
            with suppress(MissingDependency):  # what is not installed says nothing about an engine
                found = _try(output, engine, architecture, format, wanted[0])
                yield from (replace(found, scheme=scheme) for scheme in wanted)


def _demo(formats: list[str]) -> Iterator[Fact]:
    """The demo model, with times over those of dense fp32 in transformers, measured in turn with it."""
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense"
        penjing.export("demo", "dense", dense)
        for format in formats:
            for number, step in enumerate(STEPS[format]):
                path = Path(folder) / f"{format}-{number}"
                for fact in _try_all(dense, format, [step], path, {}):
                    yield _timed(fact, path, dense) if fact.verified else fact


def _installed(format: str) -> list[str]:
    return [name for name, engine in ENGINES.items() if format in engine.formats and engine.version() is not None]


def _try(path: Path, engine: str, architecture: str, format: str, scheme: str) -> Fact:
    version = ENGINES[engine].version() or ""
    fact = Fact(engine, version, architecture, format, scheme, True, True, None, None, None, "", _today())
    try:
        found = penjing.verify(path, engine=engine).as_dict()
    except EngineError as error:
        return replace(fact, loads=False, verified=None, reason=_reason(error, path))
    except MissingDependency:
        raise
    except VerificationError as error:
        return replace(fact, verified=False, reason=_reason(error, path))
    except PenjingError as error:
        return replace(fact, verified=None, reason=_reason(error, path))
    return replace(fact, kl=float(f"{found['kl']:.3g}") if found["kl"] is not None else None)


def _timed(fact: Fact, path: Path, dense: Path) -> Fact:
    load = Load(batches=(1,), lengths=(128,), steps=16, rounds=5)
    timed = penjing.bench([dense, path], ["transformers:float32", fact.engine], load=load).as_dict()
    rows = {(row["model"], row["engine"], row["dtype"]): row["speeds"][0] for row in timed["rows"]}
    base = rows[str(dense), "transformers", "float32"]
    mine = rows.get((str(path), fact.engine, "auto"), base)
    ratio = {name: round(mine[name]["median"] / base[name]["median"], 2) for name in ("prefill", "decode")}
    return replace(fact, **ratio)


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def _reason(error: Exception, path: Path) -> str:
    return str(error).replace(str(path), "the model").replace(str(path.parent), "").splitlines()[0][:200]


def page(facts: list[Fact]) -> str:
    """docs/engines.md."""
    lines = [
        "# Engines",
        "",
        "<!-- Written by scripts/truth.py from src/penjing/engines/truth.json; run it, do not edit. -->",
        "",
        "| engine | loads | install |",
        "| --- | --- | --- |",
        *(f"| `{name}` | {engine.summary} | `{engine.install}` |" for name, engine in ENGINES.items()),
        "",
        INTRODUCTION,
        "",
        "## What was tried",
        "",
        PROTOCOL,
        "",
        "| engine | version | architecture | format | scheme | loads | verified | KL | prefill | decode | date |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for fact in sorted(facts, key=lambda fact: fact.key):
        verified = {True: "yes", False: "no", None: ""}[fact.verified]
        cells = [fact.engine, fact.version, fact.architecture, f"`{fact.format}`", fact.scheme]
        cells += ["yes" if fact.loads else "no", verified, "" if fact.kl is None else f"{fact.kl:.2g}"]
        cells += ["" if ratio is None else f"{ratio:.2f}" for ratio in (fact.prefill, fact.decode)]
        lines.append("| " + " | ".join([*cells, fact.date]) + " |")
    troubles = [fact for fact in facts if fact.reason]
    if troubles:
        lines += ["", "## What did not work", ""]
        lines += [
            f"* {fact.engine}, {fact.architecture}, `{fact.format}` {fact.scheme}: {fact.reason}" for fact in troubles
        ]
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())
