"""KL to the dense model at each type of GGUF: Penjing's files beside llama.cpp's own, of the same types.

    python benchmarks/gguf_quality.py --calibration wiki.valid.raw --evaluation wiki.test.raw \\
        --work build/gguf --output benchmarks/results/gguf_quality.json --types q8_0 q4_0 q4_k_m q3_k_m q2_k_m

Both start from the same model. llama.cpp quantises in a process of its own, from a file in F32, with and without an
importance matrix: the mean squares of every linear's inputs over the same calibration windows, as its `imatrix` tool
collects them. All files are then measured by the same code, which decodes them with the gguf package and computes in
fp32. What was made stays in the working directory and what was measured in the result, so that an interrupted benchmark
goes on; rows of another protocol are dropped.

Ours is GPTQ on the grid of every tensor's type, and, with `--tune STEPS`, scales trained towards the dense model's
logits (`e2e-qp`) on the same calibration windows.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import multiprocessing
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from texts import text_arguments
from torch import Tensor

from penjing import api
from penjing.checkpoint import open_checkpoint, write_bytes
from penjing.checkpoint.gguf_names import ARCHITECTURES
from penjing.evaluation.report import Software
from penjing.formats.gguf.assembly import convert
from penjing.models import build_model, fill, find, layout_of
from penjing.pipeline.text import TextSource
from penjing.recipe import Calibration

THEIRS = {"q4_k": "Q4_K_S", "q5_k": "Q5_K_S", "q3_k": "Q3_K_S", "q2_k": "Q2_K_S", "q2_k_m": "Q2_K"}
"""llama.cpp's name for what we call a type, where it is not the same in capitals."""

RATES = {"q8_0": 1e-4}
"""Learning rate of `e2e-qp`, where the rounding to undo is so small that steps of a thousandth would be larger."""


def main() -> None:
    """Parse, make what is missing, measure, write."""
    parser = text_arguments(__doc__, samples=16, evaluation_length=1024)
    parser.add_argument("--types", nargs="+", default=["q8_0", "q4_0"])
    parser.add_argument("--tune", type=int, default=24, help="steps of e2e-qp; 0: none")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)

    checkpoint = open_checkpoint(options.model)
    layout = layout_of(checkpoint.config, checkpoint.specs())
    calibration = Calibration(data=options.calibration, samples=options.samples, length=options.length)
    text = TextSource(checkpoint).calibration(calibration)
    dense = options.work / "f32" / "f32.gguf"
    if not dense.is_file():
        convert(checkpoint, layout, dense.parent, torch.float32)
    matrix = options.work / "imatrix.safetensors"
    if not matrix.is_file():
        save_file(importance(options.model, text.tokens), matrix)

    protocol = {"calibration": text.protocol.sentence(), "tuned": f"e2e-qp, {options.tune} steps of 4 windows"}
    result = kept(options.output, protocol)
    for kind in options.types:
        files = {
            f"{kind} llama.cpp": theirs(dense, options.work / f"{kind}.gguf", kind, None),
            f"{kind} llama.cpp imatrix": theirs(dense, options.work / f"{kind}-imatrix.gguf", kind, matrix),
            f"{kind} penjing": ours(options.model, options.work / f"{kind}-penjing", kind, calibration, options.tune),
        }
        missing = {name: path for name, path in files.items() if name not in result["runs"]}
        if missing:
            measure(options, missing, result)
            result["kl_ratios"][kind] = ratios(kind, result["runs"])
            write_bytes(options.output, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result, indent=1))


def kept(output: Path, protocol: dict[str, str]) -> dict[str, Any]:
    """What an earlier call measured in the same way, or a result without rows."""
    if output.is_file():
        before: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        if protocol.items() <= before.items():
            return before
    software = Software.here().__dict__ | {"llama-cpp-python": metadata.version("llama-cpp-python")}
    return {**protocol, "software": software, "runs": {}, "kl_ratios": {}}


def measure(options: argparse.Namespace, files: dict[str, Path], result: dict[str, Any]) -> None:
    """Add a row for each of `files`."""
    measured = api.compare(
        [options.model, *files.values()],
        data=options.evaluation,
        windows=options.windows,
        length=options.evaluation_length,
    )
    result["evaluation"] = measured[0].protocol.sentence()
    result["dense_perplexity"] = measured[0].quality.perplexity
    for (name, path), found in zip(files.items(), measured[1:], strict=True):
        quality = found.quality
        result["runs"][name] = {"bytes": path.stat().st_size, "kl": quality.kl, "perplexity": quality.perplexity}


def ratios(kind: str, runs: dict[str, Any]) -> dict[str, float]:
    """Our KL over theirs, without and with an importance matrix."""
    own = runs[f"{kind} penjing"]["kl"]
    return {peer: own / runs[f"{kind} {peer}"]["kl"] for peer in ("llama.cpp", "llama.cpp imatrix")}


def ours(model: str, directory: Path, kind: str, calibration: Calibration, tune: int) -> Path:
    """The path of our file."""
    if not (directory / "report.json").is_file():
        head = {"method": "rtn", "targets": ["embedding"], "type": "q8_0", "scale_search": "weights"}
        steps = [{"method": "gptq", "type": kind, "scale_search": "diagonal"}, head]
        train = {"method": "e2e-qp", "iterations": tune, "learning_rate": RATES.get(kind, 1e-3)}
        steps += [train] if tune else []
        recipe = {"version": 1, "steps": steps, "calibration": calibration.model_dump(), "format": "gguf"}
        api.compress(model, recipe, directory, evaluated=False)
    return next(directory.glob("*.gguf"))


def theirs(dense: Path, target: Path, kind: str, matrix: Path | None) -> Path:
    """The path of llama.cpp's file, made in a process of its own."""
    if not target.is_file():
        arguments = (str(dense), str(target), kind, None if matrix is None else str(matrix))
        process = multiprocessing.get_context("spawn").Process(target=quantise, args=arguments)
        process.start()
        process.join()
        if process.exitcode:
            raise RuntimeError(f"llama.cpp did not write {target} (exit code {process.exitcode})")
    return target


def quantise(source: str, target: str, kind: str, matrix: str | None) -> None:
    """llama.cpp's own quantisation, on one thread."""
    import llama_cpp

    temporary = f"{target}.tmp"
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.nthread = 1
    settings.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{THEIRS.get(kind, kind.upper())}")
    if matrix is not None:
        settings.imatrix = c_matrix(load_file(matrix))
    if llama_cpp.llama_model_quantize(source.encode(), temporary.encode(), ctypes.byref(settings)):
        raise RuntimeError("llama.cpp failed")
    Path(temporary).rename(target)


def c_matrix(importance: dict[str, Tensor]) -> Any:
    """The importance matrix as llama.cpp takes it: names and arrays, ended by an empty entry."""
    from llama_cpp.llama_cpp import llama_model_imatrix_data

    entries = (llama_model_imatrix_data * (len(importance) + 1))()
    for entry, (name, values) in zip(entries, importance.items(), strict=False):
        numbers = (ctypes.c_float * len(values))(*values.tolist())
        entry.name, entry.data, entry.size = name.encode(), numbers, len(values)
    return entries


@torch.inference_mode()
def importance(model: str, tokens: Tensor) -> dict[str, Tensor]:
    """Mean squares of the inputs of every linear in the blocks, by the tensor's name in a GGUF file."""
    checkpoint = open_checkpoint(model)
    layout = layout_of(checkpoint.config, checkpoint.specs())
    live = build_model(checkpoint.config, layout)
    for module in layout.modules:
        tensors = {name: checkpoint.load(f"{module.name}.{name}") for name in module.tensors}
        if tensors:
            fill(find(live, module.name), tensors)
    architecture = ARCHITECTURES["llama"]
    sums: dict[str, Tensor] = {}
    for module in layout.modules:
        if module.kind == "linear":
            stored = f"{architecture.stored_name(module.name)}.weight"

            def add(_: Any, inputs: tuple[Tensor, ...], name: str = stored) -> None:
                squares = inputs[0].flatten(0, 1).square().mean(0)
                sums[name] = sums.get(name, 0) + squares / len(tokens)

            live.get_submodule(module.name).register_forward_pre_hook(add)
    for window in tokens:
        live(window.unsqueeze(0))
    return {name: values.contiguous() for name, values in sums.items()}


if __name__ == "__main__":
    main()
