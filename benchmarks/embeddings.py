"""The embedding of a model, four ways at equal size: how much of it is left, and how fast rows are looked up.

    python benchmarks/embeddings.py --output benchmarks/results/embeddings.json

Trains row by row (TensorGPT), one train over the whole table, a product of two factors (as in ALBERT) and 4 bits. No
text is needed; what the model loses is measured by `low_rank.py`. Values are stored in bf16, codes with a bf16 scale
per 64.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from penjing.checkpoint import open_checkpoint, write_bytes
from penjing.evaluation.report import Software
from penjing.methods.base import LinearInput, Options
from penjing.methods.low_rank import svd, tensor_train, tensor_train_matrix
from penjing.methods.low_rank.options import RankOptions
from penjing.methods.quantization.rtn import rtn
from penjing.models import layout_of
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Representation, Scheme
from penjing.runtime import runner_for

FACTORS = (4, 32, 50)
"""How many times smaller than bf16."""

TOKENS, ROUNDS = 512, 5


def main() -> None:
    """Measure everything, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    checkpoint = open_checkpoint(options.model)
    name = layout_of(checkpoint.config, checkpoint.specs()).embedding.name
    table = checkpoint.load(f"{name}.weight").float()
    rows = [{"form": "4 bits, groups of 64", **measured(table, rtn(table, IntegerGrid(4, 64)))}]
    for factor in FACTORS:
        for form, weight in forms(table, factor):
            rows.append({"form": form, "asked": factor, **measured(table, weight)})
            print(rows[-1], flush=True)
    dense = nn.Embedding.from_pretrained(table)
    result = {
        "model": options.model,
        "shape": list(table.shape),
        "protocol": f"look-ups: median of {ROUNDS}, {TOKENS} tokens, fp32, {torch.get_num_threads()} threads",
        "software": Software.here().__dict__,
        "dense_seconds": seconds(dense, len(table)),
        "rows": rows,
    }
    write_bytes(options.output, (json.dumps(result, indent=1) + "\n").encode())


def forms(table: Tensor, factor: float) -> list[tuple[str, Representation]]:
    """The table at least `factor` times smaller, each way that can be had."""
    (height, width), given = table.shape, LinearInput(table, {})

    def made(method: Any, options: Options) -> Representation:
        result: Representation = method.linear(given, options.for_matrix((height, width), torch.bfloat16))
        return result

    rank = int(height * width / factor) // (height + width)
    found = [
        (f"product, rank {rank}", made(svd, RankOptions(rank=rank))),
        ("one train", made(tensor_train_matrix, tensor_train_matrix.TrainMatrixOptions(ratio=1 / factor))),
    ]
    for cores in range(2, 10):
        for rank in (3, 2, 1):
            keys = tensor_train.TensorTrainOptions(cores=cores, rank=rank)
            try:
                train = keys.train(width)
            except ValueError:  # the width has too few factors
                continue
            if width / sum(train.sizes) >= factor:
                return [*found, (f"row by row, {train.label}", made(tensor_train, keys))]
    return found


def measured(table: Tensor, weight: Representation) -> dict[str, Any]:
    """Size, error, and the time of a look-up where there is one that needs no table."""
    lost = (weight.dense().float() - table).norm() / table.norm()
    layer = runner_for(nn.Embedding.from_pretrained(table), Scheme(), weight)
    return {
        "times_smaller": 2 * table.numel() / weight.nbytes(),
        "relative_error": float(lost),
        "seconds": None if layer is None else seconds(layer, len(table)),
    }


@torch.no_grad()
def seconds(layer: nn.Module, height: int) -> float:
    """Median time of a look-up in a table of so many rows."""
    tokens = torch.randint(height, (TOKENS,), generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        layer(tokens)
        times.append(time.perf_counter() - start)
    return sorted(times)[ROUNDS // 2]


if __name__ == "__main__":
    main()
