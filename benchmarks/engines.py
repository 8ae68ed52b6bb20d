"""What decodes fastest at batch 1: one model as different artefacts in different engines, measured in turn.

    python benchmarks/engines.py --output benchmarks/results/engines.json
    python benchmarks/engines.py --models demo build/demo-gguf build/demo-onnx ...

Without `--models`: the demo model's own GGUF file (Q4_1) and llama.cpp's Q4_0 of it in llama.cpp; dense fp32 in
transformers; of Penjing a GGUF file in Q4_0, ONNX with 4-bit blocks and with int8, and its own int8 and look-up linears
in transformers. Weights are rounded to nearest: how long a product takes does not depend on the codes. Ratios are to
dense fp32 in transformers. A machine that does other work makes all of them slower together; the quartiles show how far
it does.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from gguf_quality import theirs

import penjing
from penjing.checkpoint import open_checkpoint
from penjing.engines.bench import Bench, Load, Row
from penjing.formats.gguf.assembly import convert
from penjing.models import layout_of


def _rounded(name: str, bits: int, group_size: int | str, **more: Any) -> dict[str, Any]:
    steps = [{"method": "rtn", "bits": bits, "group_size": group_size, **more}]
    if name != "native":  # elsewhere the table counts as a matrix like any other, and 8 bits are the custom
        steps += [{"method": "rtn", "targets": ["embedding", "lm_head"], "bits": 8, "group_size": 64}]
    return {"steps": steps, "format": name}


RECIPES: dict[str, dict[str, Any]] = {
    "int8": _rounded("native", 8, "channel", activations={"bits": 8}),
    "lut 4 bits": {"steps": [{"method": "bcq", "bits": 4, "objective": "weights", "rounds": 0}], "format": "native"},
    "onnx 4 bits": _rounded("onnx", 4, 64),
    "onnx int8": _rounded("onnx", 8, "channel", activations={"bits": 8}),
    "gguf q4_0": {
        "steps": [{"method": "rtn", "type": "q4_0"}, {"method": "rtn", "targets": ["embedding"], "type": "q8_0"}],
        "format": "gguf",
    },
}


def main() -> None:
    """Make the artefacts, time them, write what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", type=Path, default=[])
    parser.add_argument("--lengths", nargs="+", type=int, default=[128, 512])
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        models = options.models or _artefacts(Path(folder))
        load = Load(lengths=tuple(options.lengths), steps=options.steps, rounds=options.rounds)
        engines = ("transformers:float32", "llamacpp", "onnxruntime")
        result = penjing.bench(["demo", *models], engines, load=load, threads=options.threads)
    text = json.dumps({"ratios": ratios(result), **result.as_dict()}, indent=1).replace(f"{folder}/", "")
    text = text.replace(str(open_checkpoint("demo").path), "demo")
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


def _artefacts(folder: Path) -> list[Path]:
    for name, recipe in RECIPES.items():
        penjing.compress("demo", recipe, folder / name, evaluated=False)
    checkpoint = open_checkpoint("demo")
    dense = convert(checkpoint, layout_of(checkpoint.config, checkpoint.specs()), folder / "f32", torch.float32)
    return [*(folder / name for name in RECIPES), theirs(dense, folder / "llama.cpp q4_0.gguf", "q4_0", None)]


def ratios(result: Bench) -> list[dict[str, Any]]:
    """Per artefact and prompt length: times as fast as the dense model in transformers, and share of the limit."""
    dense = next(row for row in result.rows if row.model == "demo" and row.engine == "transformers")
    return [
        {
            "model": Path(row.model).name,
            "engine": row.engine,
            "length": mine.length,
            "prefill": round(mine.prefill.median / base.prefill.median, 2),
            "decode": round(mine.decode.median / base.decode.median, 2),
            "of_the_limit": _share(row, mine.decode.median),
        }
        for row in result.rows
        for mine, base in zip(row.speeds, dense.speeds, strict=True)
    ]


def _share(row: Row, tokens_per_second: float) -> float | None:
    return None if row.ceiling is None else round(tokens_per_second / row.ceiling, 2)


if __name__ == "__main__":
    main()
