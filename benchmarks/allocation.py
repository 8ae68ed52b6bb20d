"""A mixture of choices against one choice everywhere, at equal bytes: is measuring who needs what worth it?

    python benchmarks/allocation.py --calibration wiki.valid.raw --evaluation wiki.test.raw \\
        --work build/allocation --output benchmarks/results/allocation.json

Losses of all choices for all linears are measured once and kept in the work folder. For every uniform choice, the exact
knapsack then mixes all choices within the bytes that this one takes. All results are measured on the same windows.
What was measured before stays in the output and is not measured again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from typing import Any

from low_rank import candidate
from texts import text_arguments
from torch import Tensor

from penjing import api
from penjing.checkpoint import open_checkpoint, write_bytes
from penjing.evaluation.report import Software
from penjing.methods.allocation.knapsack import knapsack
from penjing.models import layout_of
from penjing.pipeline import measure
from penjing.pipeline.choices import read_choices
from penjing.pipeline.measure import Candidate
from penjing.pipeline.menu import Menu
from penjing.pipeline.text import TextSource
from penjing.recipe import Recipe, load_recipe

CHOICES = "dense,8,4,3,2,2:4+4"
UNIFORM = ("3", "2:4+4", "2", "4")
"""Choices that are compared with mixtures of all of them at their bytes, in the order in which they are measured."""


def main() -> None:
    """Parse, run what is missing, print, write."""
    parser = text_arguments(__doc__, samples=8, evaluation_length=1024)
    parser.add_argument("--choices", default=CHOICES)
    parser.add_argument("--only", nargs="*", default=UNIFORM, help="uniform choices to compare with")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"runs": {}}
    if options.output.is_file():
        result = json.loads(options.output.read_text(encoding="utf-8"))
    recipes = equal_bytes(options, base(options), result)
    checkpoint = open_checkpoint(options.model)
    text = TextSource(checkpoint).evaluation(options.evaluation, options.windows, options.evaluation_length)
    dense = None
    for name, recipe in recipes.items():
        if name in result["runs"]:
            continue
        dense = dense or candidate(checkpoint, text.tokens)
        result["evaluation"], result["software"] = text.protocol.sentence(), Software.here().__dict__
        result["dense_perplexity"] = measure.compare(dense, text.tokens).result().perplexity
        result["runs"][name] = measured(recipe, options, text.tokens, dense)
        write_bytes(options.output, (json.dumps(result, indent=1) + "\n").encode())
        print(name, json.dumps(result["runs"][name]), flush=True)


def base(options: argparse.Namespace) -> Recipe:
    """GPTQ in groups of 64; the choices bring their bits."""
    step = {"method": "gptq", "bits": 3, "group_size": 64, "scale_rule": "signed-max", "scale_search": "diagonal"}
    calibration = {"data": options.calibration, "samples": options.samples, "length": options.length}
    return load_recipe({"version": 1, "format": "native", "steps": [step], "calibration": calibration})


def equal_bytes(options: argparse.Namespace, recipe: Recipe, result: dict[str, Any]) -> dict[str, Recipe]:
    """Name -> recipe: every uniform choice, and the mixture that takes no more bytes."""
    checkpoint = open_checkpoint(options.model)
    layout = layout_of(checkpoint.config, checkpoint.specs())
    menu = Menu.open(checkpoint, layout, recipe, read_choices(options.choices))
    kept = options.work / "losses.json"
    if not kept.is_file():
        start, number = time.perf_counter(), len(menu.choices) // 2  # the losses are the same for every budget
        found = api.allocate(options.model, recipe, choices=options.choices, budget=menu.totals[number], by="gradient")
        losses = {"seconds": time.perf_counter() - start, "losses": [share.losses for share in found.shares]}
        write_bytes(kept, json.dumps(losses).encode())
    measured_losses = json.loads(kept.read_text(encoding="utf-8"))
    result["choices"], result["seconds_of_losses"] = options.choices, measured_losses["seconds"]
    names = [str(choice) for choice in menu.choices]
    recipes: dict[str, Recipe] = {}
    for name in options.only:
        number = names.index(name)
        chosen = knapsack(menu.sizes, measured_losses["losses"], menu.totals[number] - menu.fixed)
        uniform, mixture = menu.assemble([number] * len(menu.units)), menu.assemble(chosen)
        assert uniform is not None and mixture is not None
        recipes |= {f"{name} everywhere": uniform, f"a mixture in the bytes of {name}": mixture}
        counts = {names[option]: chosen.count(option) for option in sorted(set(chosen))}
        result.setdefault("mixtures", {})[name] = counts
        print(name, counts, flush=True)
    return recipes


def measured(recipe: Recipe, options: argparse.Namespace, tokens: Tensor, dense: Candidate) -> dict[str, Any]:
    """Compress, and compare with the dense model."""
    directory = options.work / "model"
    shutil.rmtree(directory, ignore_errors=True)
    report = api.compress(options.model, recipe, directory, evaluated=False)
    quality = measure.compare(candidate(open_checkpoint(directory), tokens), tokens, dense).result()
    assert report.calibration is not None
    return {
        "bytes": sum(row.bytes for row in report.modules),
        "predicted_bytes": report.predicted_bytes,
        "perplexity": quality.perplexity,
        "kl": quality.kl,
        "top1": quality.top1,
        "calibration": report.calibration.sentence(),
        "seconds": report.seconds["compress"],
    }


if __name__ == "__main__":
    main()
