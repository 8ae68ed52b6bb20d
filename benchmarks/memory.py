"""Peak memory against depth and size, on models with random weights that this script writes.

    python benchmarks/memory.py depth --work build/memory --output benchmarks/results/memory_depth.json
    python benchmarks/memory.py 7b --work build/memory --output benchmarks/results/memory_7b.json

`depth` doubles the layers of a model of equal width. `7b` has the shape of Llama 2 7B in bf16 with the vocabulary of
the demo tokenizer, 13.8 GB in 33 shards, and goes through RTN and through GPTQ on 8 windows of 512 tokens. Random
weights say nothing of quality, and need not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from measured import import_baseline, run

from penjing.checkpoint import open_checkpoint, write_bytes, write_index, write_shard
from penjing.evaluation.report import Software
from penjing.models import layout_of

SHAPES: dict[str, dict[str, int]] = {
    "7b": {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "num_hidden_layers": 32,
        "vocab_size": 49152,
    },
    "narrow": {
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "num_hidden_layers": 6,
        "vocab_size": 49152,
    },
}
STEPS = {"rtn": {"method": "rtn"}, "gptq": {"method": "gptq"}}


def main() -> None:
    """Parse, write the models, compress them, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["depth", "7b"])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=list(STEPS), choices=list(STEPS))
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    if options.what == "7b":
        models = {"7b": write_model(options.work / "7b", SHAPES["7b"])}
    else:
        shapes = {layers: SHAPES["narrow"] | {"num_hidden_layers": layers} for layers in (6, 12)}
        models = {f"{layers} layers": write_model(options.work / str(layers), shapes[layers]) for layers in shapes}
    runs = {
        f"{name}, {method}": compress(model, method, options.work)
        for name, model in models.items()
        for method in options.methods
    }
    result: dict[str, Any] = {"software": Software.here().__dict__, "runs": runs}
    if options.what == "depth":
        result["growth when depth doubles"] = {
            method: runs[f"12 layers, {method}"]["memory"] / runs[f"6 layers, {method}"]["memory"] - 1
            for method in options.methods
        }
    write_bytes(options.output, (json.dumps(result, indent=1) + "\n").encode())
    print(json.dumps(result, indent=1))


def write_model(directory: Path, shape: dict[str, int]) -> Path:
    """A Llama with random bf16 weights, a shard per block. Blocks are alike: the bytes matter here, not the values."""
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16", **shape}
    config |= {
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    }
    layout = layout_of(config)
    shards: dict[str, list[str]] = {}
    kept: dict[str, torch.Tensor] = {}
    total = 0
    for number, block in enumerate([None, *range(layout.blocks)]):
        tensors = {}
        for module in layout.of_block(block):
            for name, dims in zip(module.tensor_names(), module.tensors.values(), strict=True):
                role = name.removeprefix(f"{layout.block_name(block)}.") if block is not None else name
                if role not in kept:
                    kept[role] = random_tensor(module.kind, dims)
                tensors[name] = kept[role]
        shard = f"model-{number + 1:05d}-of-{layout.blocks + 1:05d}.safetensors"
        total += sum(tensor.numel() * 2 for tensor in tensors.values())
        if not (directory / shard).is_file():
            write_shard(directory / shard, tensors)
        shards[shard] = list(tensors)
    write_index(directory, shards, total)
    write_bytes(directory / "config.json", json.dumps(config).encode())
    for name, content in open_checkpoint("demo").files():
        write_bytes(directory / name, content)
    return directory


def random_tensor(kind: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Ones for a norm, small normal numbers otherwise."""
    if kind == "norm":
        return torch.ones(shape, dtype=torch.bfloat16)
    return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02)


def compress(model: Path, method: str, work: Path) -> dict[str, float]:
    """`penjing compress` without evaluation; its peak memory and time."""
    directory = work / f"{model.name}-{method}"
    shutil.rmtree(directory, ignore_errors=True)
    recipe = {
        "version": 1,
        "steps": [STEPS[method] | {"bits": 4, "group_size": 64}],
        "calibration": {"samples": 8, "length": 512},
    }
    write_bytes(work / f"{method}.yaml", yaml.safe_dump(recipe).encode())
    command = [sys.executable, "-m", "penjing", "compress", str(model), "-r", str(work / f"{method}.yaml")]
    cost = run([*command, "-o", str(directory), "--no-eval"], work / f"{model.name}-{method}.log")
    shutil.rmtree(directory)
    return {"seconds": cost.seconds, "peak": cost.peak, "memory": cost.peak - import_baseline()}


if __name__ == "__main__":
    main()
