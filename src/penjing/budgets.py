"""Recipes that Penjing writes: who gets how much, measured on the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from penjing.checkpoint import Checkpoint, open_checkpoint
from penjing.errors import OutputError
from penjing.models import Layout, layout_of
from penjing.recipe import Recipe, load_recipe

if TYPE_CHECKING:
    from penjing.pipeline.allocation import Allocation
    from penjing.pipeline.ranks import RankLoss, Ranks
    from penjing.pipeline.sensitivity import Sensitivity
    from penjing.pipeline.sparsities import Sparsities, SparsityRule
    from penjing.progress import Progress

Model = str | Path
"""`demo`, a model directory, a .gguf file, or a hub id."""


def silent(stage: str, done: int, total: int, detail: str = "") -> None:
    """No progress is shown unless the caller asks for it."""


def allocate(
    model: Model,
    recipe: str | Path | dict[str, Any] | Recipe,
    *,
    budget: int | str | None = None,
    bits: float | None = None,
    params: int | str | None = None,
    latency: float | None = None,
    speedup: float | None = None,
    choices: str = "2,3,4,6,8",
    by: Sensitivity = "gradient",
    generations: int = 0,
    offspring: int = 16,
    output: str | Path | None = None,
    progress: Progress = silent,
    trust_remote_code: bool = False,
) -> Allocation:
    """Choose bits for every linear so that the predicted loss is least within a budget; a recipe comes out.

    budget   bytes of the whole model, as a number or as words ("80MB"); or else
    bits     per weight of the linears of the blocks, scales included; or else
    params   weights of the whole model that are not zero, as a number or as words ("100M"); or else
    latency  milliseconds for a decoded token at batch 1 on this machine, in transformers; or else
    speedup  the dense model's time for a token over the result's, likewise
    choices  bits, bits with a group size (`3g64`), sparsity with or without bits (`50%`, `2:4+4`), other methods
             (`ternary`, `wanda(sparsity=0.3)`) and `dense`, with commas; they replace the recipe's steps with bits
    by       how losses are estimated: `output`, `gradient` or `kl`
    generations, offspring
             of an evolutionary search (EvoPress) that refines the result on the measured KL divergence; 0: none
    output   a new file for the recipe, in YAML

    Raises PlanError when nothing fits the budget, OutputError when the file exists.
    """
    from penjing.methods.allocation.evopress import Search
    from penjing.models import check_tied_head
    from penjing.pipeline import allocation
    from penjing.pipeline.choices import read_choices
    from penjing.pipeline.prices import Budget
    from penjing.pipeline.written_text import calibration_text

    chosen, wanted = load_recipe(recipe), read_choices(choices)
    size = None if budget is None else allocation.read_bytes(budget)
    limits = Budget(bytes=size, bits=bits, params=params, latency=latency, speedup=speedup)
    checkpoint, layout = _opened(model, output, trust_remote_code)
    check_tied_head(layout, checkpoint)
    result = allocation.allocate(
        checkpoint,
        layout,
        chosen,
        budget=limits,
        choices=wanted,
        by=by,
        search=Search(generations, offspring),
        progress=progress,
        text=lambda: (
            calibration_text(checkpoint, chosen.calibration, progress, trust_remote_code=trust_remote_code).tokens
        ),
        trust_remote_code=trust_remote_code,
    )
    return _written(result, output)


def distribute(
    model: Model,
    recipe: str | Path | dict[str, Any] | Recipe,
    *,
    by: SparsityRule = "owl",
    above: float = 5.0,
    spread: float = 0.08,
    output: str | Path | None = None,
    progress: Progress = silent,
    trust_remote_code: bool = False,
) -> Sparsities:
    """Give every block or linear a sparsity of its own, with the mean that the recipe says; a recipe comes out.

    by      `owl`: blocks with many outliers keep more; `magnitude`: one threshold for the weights of the whole model
    above   for `owl`: an outlier exceeds the mean score of its block so many times
    spread  for `owl`: sparsities lie within twice this number of each other
    output  as in `allocate`
    """
    from penjing.pipeline import sparsities

    checkpoint, layout = _opened(model, output, trust_remote_code)
    look = sparsities.Look(checkpoint, layout, load_recipe(recipe), progress, trust_remote_code)
    return _written(sparsities.distribute(look, by=by, above=above, spread=spread), output)


def ranks(
    model: Model,
    recipe: str | Path | dict[str, Any] | Recipe,
    *,
    ratio: float | None = None,
    energy: float | None = None,
    by: RankLoss = "gradient",
    output: str | Path | None = None,
    progress: Progress = silent,
    trust_remote_code: bool = False,
) -> Ranks:
    """Choose a rank for every linear of a recipe's low-rank step from the spectra of their outputs; a recipe comes out.

    ratio   parameters of those linears, over what they were: the least summed loss that fits
    energy  or else the share of every linear's squared output that is kept
    by      how losses are estimated for a ratio: from gradients of the model's predictions, or by output error
    output  a new file for the recipe, in YAML

    Raises PlanError when nothing fits, OutputError when the file exists.
    """
    from penjing.models import check_tied_head
    from penjing.pipeline.ranks import choose_ranks

    checkpoint, layout = _opened(model, output, trust_remote_code)
    check_tied_head(layout, checkpoint)
    result = choose_ranks(
        checkpoint,
        layout,
        load_recipe(recipe),
        ratio=ratio,
        energy=energy,
        by=by,
        progress=progress,
        trust_remote_code=trust_remote_code,
    )
    return _written(result, output)


def _opened(model: Model, output: str | Path | None, trust_remote_code: bool) -> tuple[Checkpoint, Layout]:
    """A model for which a recipe will be written; OutputError if there is one already."""
    if output is not None and Path(output).exists():
        raise OutputError(f"{output} exists; a recipe is not overwritten")
    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code)
    return checkpoint, layout_of(checkpoint.config, checkpoint.specs(), trust_remote_code=trust_remote_code)


def _written(result: Allocation | Sparsities | Ranks, output: str | Path | None) -> Any:
    if output is not None:
        Path(output).write_text(result.recipe_text(), encoding="utf-8")
    return result
