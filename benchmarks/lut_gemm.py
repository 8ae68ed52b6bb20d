"""Products with few tokens: dense linears against binary-coded ones that multiply by table look-up.

    python benchmarks/lut_gemm.py --output benchmarks/results/lut_gemm.json [--model demo]

Two parts: linears of random codes, for 1 to 8 tokens at a time, against `F.linear` in fp32 and bf16 and, where
onnxruntime is installed, its 4-bit MatMulNBits; and a whole model, compressed without calibration (speed does not look
at values) and loaded with `from_pretrained`, that writes text. All variants take turns in every round, so that
a busy machine disturbs all of them alike; the fastest round of each counts, which says what the machine can do.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

import penjing
from penjing.numerics.binary_coding import BinaryGrid
from penjing.representations import BinaryCoded
from penjing.runtime.lut import LUTLinear

SHAPES = ((576, 576), (1536, 576), (4096, 4096), (11008, 4096))
BITS = (1, 2, 3, 4)


def main() -> None:
    """Parse, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--model", default="demo", help="a model to compress and load; empty: linears only")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    result: dict[str, Any] = {
        "hardware": {"processor": processor(), "threads": torch.get_num_threads()},
        "software": {"torch": torch.__version__, "penjing": penjing.__version__},
        "group_size": 128,
        "rounds": options.rounds,
        "linears": {
            f"{rows}x{columns}": {
                str(tokens): linears(rows, columns, tokens, options.rounds) for tokens in options.tokens
            }
            for rows, columns in SHAPES
        },
    }
    if options.model:
        with tempfile.TemporaryDirectory() as folder:
            result["model"] = model(options.model, Path(folder), 5)
    text = json.dumps(result, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


@torch.inference_mode()
def linears(rows: int, columns: int, tokens: int, rounds: int) -> dict[str, Any]:
    """Microseconds, and how many times as fast as fp32, of each variant."""
    weight, x = torch.randn(rows, columns), torch.randn(tokens, columns)
    half, half_x = weight.bfloat16(), x.bfloat16()
    coded = {f"{bits} bits": random_linear(rows, columns, BinaryGrid(bits, 128)) for bits in BITS}
    variants: dict[str, Callable[[], object]] = {
        "fp32": lambda: linear(x, weight),
        "bf16": lambda: linear(half_x, half),
        **{name: (lambda layer=layer: layer(x)) for name, layer in coded.items()},
    }
    if session := matmul_nbits(rows, columns):
        given = {"x": x.numpy()}
        variants["onnxruntime 4 bits"] = lambda: session.run(None, given)
    repeats = max(1, 20_000_000 // (rows * columns * tokens))
    return _turns(variants, rounds, repeats)


@torch.inference_mode()
def model(name: str, folder: Path, rounds: int) -> dict[str, Any]:
    """Tokens per second of greedy decoding, and how many times as fast as dense fp32."""
    from transformers import AutoModelForCausalLM

    models = {}
    for label, step in {"fp32": None, **{f"{bits} bits": bits for bits in (2, 3, 4)}}.items():
        recipe: dict[str, Any] = {
            "steps": [{"method": "bcq", "bits": step or 8, "objective": "weights", "rounds": 0}],
            "format": "dense" if step is None else "native",
            "dtype": "float32" if step is None else "bfloat16",
        }
        penjing.compress(name, recipe, folder / label, evaluated=False)
        models[label] = AutoModelForCausalLM.from_pretrained(folder / label, dtype=torch.float32).eval()
    prompt = torch.arange(5, 13).unsqueeze(0)
    count = 24

    def write(label: str) -> None:
        models[label].generate(prompt, max_new_tokens=count, min_new_tokens=count, do_sample=False)

    result = _turns({label: (lambda label=label: write(label)) for label in models}, rounds, 1)
    for entry in result.values():
        entry["tokens_per_second"] = round(count / entry.pop("microseconds") * 1e6, 1)
    return result


def _turns(variants: Mapping[str, Callable[[], object]], rounds: int, repeats: int) -> dict[str, Any]:
    times: dict[str, list[float]] = {name: [] for name in variants}
    for run in variants.values():
        run()
    for _ in range(rounds):
        for name, run in variants.items():
            start = time.perf_counter()
            for _ in range(repeats):
                run()
            times[name].append((time.perf_counter() - start) / repeats)
    best = {name: min(taken) for name, taken in times.items()}
    return {
        name: {"microseconds": round(taken * 1e6, 1), "times_as_fast": round(best["fp32"] / taken, 2)}
        for name, taken in best.items()
    }


def random_linear(rows: int, columns: int, grid: BinaryGrid) -> LUTLinear:
    """A linear of random codes and scales."""
    codes = torch.randint(0, 2**grid.bits, (rows, columns), dtype=torch.uint8)
    alpha = torch.rand(rows, grid.groups(columns), grid.bits).to(grid.scale_dtype)
    return LUTLinear(BinaryCoded(codes, alpha, None, grid))


def matmul_nbits(rows: int, columns: int) -> Any:
    """A session of one 4-bit product, blocks of 128, 8-bit inputs allowed; None without onnxruntime and onnx."""
    try:
        import onnx
        import onnxruntime
    except ImportError:
        return None
    blocks = -(-columns // 128)
    codes = torch.randint(0, 256, (rows, blocks, 64), dtype=torch.uint8).numpy()
    node = onnx.helper.make_node(
        "MatMulNBits", ["x", "codes", "scales"], ["y"], domain="com.microsoft",
        K=columns, N=rows, bits=4, block_size=128, accuracy_level=4,
    )  # fmt: skip
    graph = onnx.helper.make_graph(
        [node],
        "product",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [None, columns])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None, rows])],
        [
            onnx.numpy_helper.from_array(codes, "codes"),
            onnx.numpy_helper.from_array(torch.rand(rows * blocks).numpy(), "scales"),
        ],
    )
    opsets = [onnx.helper.make_opsetid("", 17), onnx.helper.make_opsetid("com.microsoft", 1)]
    built = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
    threads = onnxruntime.SessionOptions()
    threads.intra_op_num_threads = torch.get_num_threads()
    return onnxruntime.InferenceSession(built.SerializeToString(), threads)


def processor() -> str:
    """What the processor calls itself, and what torch uses of it."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {torch.backends.cpu.get_cpu_capability()}"


if __name__ == "__main__":
    main()
