"""Low rank, weight sharing and compressed embeddings on the demo model: perplexity and KL at equal size.

    python benchmarks/low_rank.py --calibration wiki.valid.raw --evaluation wiki.test.raw \\
        --work build/low_rank --output benchmarks/results/low_rank.json

The dense model is run once; every result is compared with it on the same windows. What was measured before stays in the
output and is not measured again: remove the file to start afresh.
"""

from __future__ import annotations

import argparse
import json
import shutil
from typing import Any

from texts import text_arguments
from torch import Tensor

from penjing import api
from penjing.checkpoint import open_checkpoint, write_bytes
from penjing.checkpoint.base import Checkpoint
from penjing.evaluation.report import Software
from penjing.models import layout_of
from penjing.pipeline import measure
from penjing.pipeline.measure import Candidate
from penjing.pipeline.stream import StreamedModel
from penjing.pipeline.text import TextSource
from penjing.pipeline.weights import Weights
from penjing.recipe import Recipe, load_recipe

Steps = list[dict[str, Any]]

EIGHT, NINE = {"ratio": 0.8, "multiple": 1}, {"ratio": 0.9, "multiple": 1}
THREE = {"bits": 3, "scale_rule": "signed-max"}
TABLE = {"targets": ["embedding"]}

RUNS: dict[str, Steps] = {
    # 80 and 90 % of the parameters of every linear
    "svd, 0.8": [{"method": "svd", **EIGHT}],
    "asvd, 0.8": [{"method": "asvd", **EIGHT}],
    "svd-llm, 0.8": [{"method": "svd-llm", **EIGHT}],
    "svd, 0.9": [{"method": "svd", **NINE}],
    "asvd, 0.9": [{"method": "asvd", **NINE}],
    "svd-llm, 0.9": [{"method": "svd-llm", **NINE}],
    # 16 values per row
    "rtn, 4 bits, per row": [{"method": "rtn", "bits": 4, "group_size": "channel", "scale_search": "diagonal"}],
    "kmeans, 4 bits, per row": [{"method": "kmeans", "bits": 4}],
    # 3.5 bits per weight: narrower groups, or a correction of rank 16 in 8 bits
    "gptq, 3 bits, groups of 32": [{"method": "gptq", "group_size": 32, **THREE}],
    "lqer on gptq, 3 bits, groups of 128, rank 16": [{"method": "lqer", "group_size": 128, "rank": 16, **THREE}],
    "rtn, 3 bits, groups of 32": [{"method": "rtn", "group_size": 32, **THREE}],
    "lqer on rtn, 3 bits, groups of 128, rank 16": [
        {"method": "lqer", "group_size": 128, "rank": 16, "base": "rtn", **THREE}
    ],
    "lqer on gptq, 3 bits, groups of 128, rank 16, 4 rounds": [
        {"method": "lqer", "group_size": 128, "rank": 16, "rounds": 4, **THREE}
    ],
    "lqer on rtn, 3 bits, groups of 128, rank 16, 4 rounds": [
        {"method": "lqer", "group_size": 128, "rank": 16, "base": "rtn", "rounds": 4, **THREE}
    ],
    # the embedding alone, which is also the output head
    "embedding: rtn, 4 bits, groups of 64": [{"method": "rtn", "bits": 4, "group_size": 64, **TABLE}],
    "embedding: svd, rank 144": [{"method": "svd", "rank": 144, **TABLE}],
    "embedding: tensor train 24x24, rank 3": [{"method": "tensor-train", "modes": [24, 24], "rank": 3, **TABLE}],
    "embedding: tensor-train matrix, 4 x": [{"method": "tensor-train-matrix", "ratio": 1 / 4, **TABLE}],
    # 32 times smaller, which is as small as rows of 576 numbers can be as trains of their own, and 50 times
    "embedding: svd, rank 17": [{"method": "svd", "rank": 17, **TABLE}],
    "embedding: tensor train 8 modes, rank 1": [{"method": "tensor-train", "cores": 8, "rank": 1, **TABLE}],
    "embedding: tensor-train matrix, 32 x": [{"method": "tensor-train-matrix", "ratio": 1 / 32, **TABLE}],
    "embedding: svd, rank 11": [{"method": "svd", "rank": 11, **TABLE}],
    "embedding: tensor-train matrix, 50 x": [{"method": "tensor-train-matrix", "ratio": 1 / 50, **TABLE}],
    # 4 blocks fewer, or 4 with the weights of another
    "greedy-layers, 4 blocks": [{"method": "greedy-layers", "drop": 4}],
    "tie, 4 blocks": [{"method": "tie", "blocks": 4}],
    "tie, 4 blocks, no factors": [{"method": "tie", "blocks": 4, "scale": "none"}],
    "tie, feed-forward of 4 blocks": [{"method": "tie", "blocks": 4, "linears": ["mlp.*"]}],
}
"""Name -> steps, in the order in which they are measured."""

RANKS = {
    f"svd-llm, {keys['ratio']}, ranks by {by}": (keys, by) for keys in (EIGHT, NINE) for by in ("output", "gradient")
}
"""Name -> keys of a step of which `penjing ranks` makes one step per rank, and what it goes by."""

HYBRIDS = ("sparse-4bit-sparsegpt", "svd-llm-4bit", "drop-refit-quantise", "deep-compression", "tied-4bit")
"""Built-in recipes of more than one family, with the calibration text of this benchmark."""


def main() -> None:
    """Parse, run what is missing, print, write."""
    parser = text_arguments(__doc__, samples=16, evaluation_length=1024)
    parser.add_argument("--only", nargs="*", help="runs whose names contain one of these words")
    options = parser.parse_args()
    result: dict[str, Any] = {"runs": {}}
    if options.output.is_file():
        result = json.loads(options.output.read_text(encoding="utf-8"))
    chosen = [
        name for name in (*RUNS, *RANKS, *HYBRIDS) if not options.only or any(word in name for word in options.only)
    ]
    missing = [name for name in chosen if name not in result["runs"]]
    if not missing:
        return
    checkpoint = open_checkpoint(options.model)
    text = TextSource(checkpoint).evaluation(options.evaluation, options.windows, options.evaluation_length)
    dense = candidate(checkpoint, text.tokens)
    result["evaluation"], result["software"] = text.protocol.sentence(), Software.here().__dict__
    result["dense_perplexity"] = measure.compare(dense, text.tokens).result().perplexity
    for name in missing:
        result["runs"][name] = measured(recipe_of(name, options), options, text.tokens, dense, result)
        write_bytes(options.output, (json.dumps(result, indent=1) + "\n").encode())
        print(name, json.dumps(result["runs"][name]), flush=True)


def candidate(checkpoint: Checkpoint, tokens: Tensor) -> Candidate:
    """A model, run on the windows."""
    layout = layout_of(checkpoint.config, checkpoint.specs())
    return measure.run(StreamedModel(checkpoint.config, layout, Weights(checkpoint, layout).live), tokens)


def recipe_of(name: str, options: argparse.Namespace) -> Recipe:
    """The recipe of a row."""
    calibration = {"data": options.calibration, "samples": options.samples, "length": options.length}
    if name in HYBRIDS:
        return load_recipe(load_recipe(name).as_dict() | {"calibration": calibration})
    keys, by = RANKS.get(name, ({}, None))
    steps = RUNS[name] if by is None else [{"method": "svd-llm", **keys}]
    recipe = load_recipe({"version": 1, "format": "native", "steps": steps, "calibration": calibration})
    return recipe if by is None else api.ranks(options.model, recipe, ratio=keys["ratio"], by=by).recipe


def measured(
    recipe: Recipe, options: argparse.Namespace, tokens: Tensor, dense: Candidate, result: dict[str, Any]
) -> dict[str, Any]:
    """Compress, and compare with the dense model."""
    directory = options.work / "model"
    shutil.rmtree(directory, ignore_errors=True)
    report = api.compress(options.model, recipe, directory, evaluated=False)
    if report.calibration is not None:
        result["calibration"] = report.calibration.sentence()
    quality = measure.compare(candidate(open_checkpoint(directory), tokens), tokens, dense).result()
    changed = [row for row in report.modules if row.steps]
    weights = sum(row.shape[0] * row.shape[1] for row in changed)
    return {
        "bits_per_weight": 8 * sum(row.bytes for row in changed) / weights if weights else None,
        "file_bytes": sum(row.bytes for row in report.modules),
        "predicted_over_real_bytes": report.predicted_bytes / sum(row.bytes for row in report.modules),
        "perplexity": quality.perplexity,
        "kl": quality.kl,
        "top1": quality.top1,
        "seconds": report.seconds["compress"],
    }


if __name__ == "__main__":
    main()
