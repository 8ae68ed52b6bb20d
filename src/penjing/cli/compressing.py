"""Verbs that look at a model and make a smaller one."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from penjing.cli.options import (
    DataOption,
    EngineOption,
    FormatOption,
    JsonOption,
    LengthOption,
    Listing,
    ModelArgument,
    ParamsOption,
    RankLossName,
    RecipeOption,
    SamplesOption,
    SeedOption,
    SensitivityName,
    SparsityName,
    SparsityOption,
    SpeedupOption,
    TrustOption,
)
from penjing.cli.output import show, working
from penjing.memory import nothing_collected

if TYPE_CHECKING:
    from penjing.recipe import Recipe


@nothing_collected()
def inspect(model: ModelArgument, as_json: JsonOption = False, trust_remote_code: TrustOption = False) -> None:
    """Show what a model is made of; reads headers, no weights."""
    from penjing import api, tables

    with working():
        result = api.inspect(model, trust_remote_code=trust_remote_code)
    show(result.as_dict(), tables.inspection, as_json)


@nothing_collected()
def list_(what: Annotated[Listing, typer.Argument(help="what to list")], as_json: JsonOption = False) -> None:
    """List what Penjing knows."""
    from penjing import tables

    show(tables.LISTINGS[what](), tables.listing, as_json)


@nothing_collected()
def plan(
    model: ModelArgument,
    recipe: RecipeOption,
    sparsity: SparsityOption = None,
    params: ParamsOption = None,
    speedup: SpeedupOption = None,
    data: DataOption = None,
    samples: SamplesOption = None,
    length: LengthOption = None,
    format: FormatOption = None,
    seed: SeedOption = None,
    engine: EngineOption = None,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Say what a recipe would do to a model, tensor by tensor, and every problem; reads no weights."""
    from penjing import api, tables

    chosen = _recipe(recipe, format, data=data, samples=samples, length=length, seed=seed)
    with working():
        chosen = _aimed(chosen, sparsity, params, speedup)
        result = api.plan(model, chosen, engine=engine, trust_remote_code=trust_remote_code)
    show(result.as_dict(), tables.plan, as_json)


def allocate(
    model: ModelArgument,
    recipe: RecipeOption,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="a new file for the recipe")],
    budget: Annotated[str | None, typer.Option("--bytes", metavar="SIZE", help="of the whole model: 80MB")] = None,
    bits: Annotated[float | None, typer.Option(min=0, help="per weight of the linears, scales included")] = None,
    params: Annotated[
        str | None, typer.Option(metavar="COUNT", help="weights that are not zero, of the model: 100M")
    ] = None,
    latency: Annotated[
        float | None, typer.Option(min=0, metavar="MS", help="milliseconds for a decoded token on this machine")
    ] = None,
    speedup: Annotated[float | None, typer.Option(min=0, help="over the dense model, likewise")] = None,
    choices: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="bits, also with a group size (3g64); sparsity (50%), also with bits (2:4+4); methods; dense; drop",
        ),
    ] = "2,3,4,6,8",
    by: Annotated[
        SensitivityName,
        typer.Option(help="estimate of losses: relative output error, expected from gradients, measured KL"),
    ] = SensitivityName.gradient,
    generations: Annotated[int, typer.Option(min=0, help="of a search that refines by measured KL (EvoPress)")] = 0,
    offspring: Annotated[int, typer.Option(min=1, help="of each generation")] = 16,
    data: DataOption = None,
    samples: SamplesOption = None,
    length: LengthOption = None,
    format: FormatOption = None,
    seed: SeedOption = None,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Choose what every linear becomes within a budget, by measured losses; writes a recipe for `compress`."""
    from penjing import api, tables

    chosen = _recipe(recipe, format, data=data, samples=samples, length=length, seed=seed)
    with working() as progress:
        result = api.allocate(
            model,
            chosen,
            budget=budget,
            bits=bits,
            params=params,
            latency=latency,
            speedup=speedup,
            choices=choices,
            by=by.value,
            generations=generations,
            offspring=offspring,
            output=output,
            progress=progress,
            trust_remote_code=trust_remote_code,
        )
    show(result.as_dict(), tables.allocation, as_json)


def distribute(
    model: ModelArgument,
    recipe: RecipeOption,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="a new file for the recipe")],
    by: Annotated[
        SparsityName,
        typer.Option(help="blocks with more outliers keep more, or one threshold for the weights of the whole model"),
    ] = SparsityName.owl,
    above: Annotated[float, typer.Option(min=1, help="owl: an outlier exceeds the mean score so many times")] = 5.0,
    spread: Annotated[float, typer.Option(min=0, help="owl: half the distance of the furthest sparsities")] = 0.08,
    format: FormatOption = None,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Give every block or linear its own sparsity and keep the recipe's mean; writes a recipe for `compress`."""
    from penjing import api, tables

    with working() as progress:
        result = api.distribute(
            model,
            _recipe(recipe, format),
            by=by.value,
            above=above,
            spread=spread,
            output=output,
            progress=progress,
            trust_remote_code=trust_remote_code,
        )
    show(result.as_dict(), tables.sparsities, as_json)


def ranks(
    model: ModelArgument,
    recipe: RecipeOption,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="a new file for the recipe")],
    ratio: Annotated[float | None, typer.Option(min=0, max=1, help="parameters of the linears kept, of all")] = None,
    energy: Annotated[float | None, typer.Option(min=0, max=1, help="share of each squared output kept")] = None,
    by: Annotated[RankLossName, typer.Option(help="how losses are estimated, for a ratio")] = RankLossName.gradient,
    data: DataOption = None,
    samples: SamplesOption = None,
    length: LengthOption = None,
    format: FormatOption = None,
    seed: SeedOption = None,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Choose a rank for every linear from the spectra of their outputs; writes a recipe for `compress`."""
    from penjing import api, tables

    chosen = _recipe(recipe, format, data=data, samples=samples, length=length, seed=seed)
    with working() as progress:
        result = api.ranks(
            model,
            chosen,
            ratio=ratio,
            energy=energy,
            by=by.value,
            output=output,
            progress=progress,
            trust_remote_code=trust_remote_code,
        )
    show(result.as_dict(), tables.ranks, as_json)


def compress(
    model: ModelArgument,
    recipe: RecipeOption,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="a new directory, or one to resume in")],
    sparsity: SparsityOption = None,
    params: ParamsOption = None,
    speedup: SpeedupOption = None,
    data: DataOption = None,
    samples: SamplesOption = None,
    length: LengthOption = None,
    format: FormatOption = None,
    seed: SeedOption = None,
    evaluated: Annotated[bool, typer.Option("--eval/--no-eval", help="measure the result")] = True,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Compress a model, verify what was written, and measure it. Killed? Run the same command again: it resumes."""
    from penjing import api, tables

    chosen = _recipe(recipe, format, data=data, samples=samples, length=length, seed=seed)
    with working() as progress:
        chosen = _aimed(chosen, sparsity, params, speedup)
        report = api.compress(
            model, chosen, output, progress=progress, evaluated=evaluated, trust_remote_code=trust_remote_code
        )
    show(report.as_dict(), tables.report, as_json)


def _recipe(name: str, format: str | None, **calibration: Any) -> Recipe:
    """The named recipe with what the command line overrides, validated again."""
    from penjing.recipe import load_recipe

    recipe = load_recipe(name)
    changed = {key: value for key, value in calibration.items() if value is not None}
    if not changed and format is None:
        return recipe
    keys = recipe.as_dict()
    keys["calibration"] |= changed
    keys["format"] = format or keys["format"]
    return load_recipe(keys)


def _aimed(recipe: Recipe, sparsity: float | None, params: str | None, speedup: float | None) -> Recipe:
    """The recipe with the target that the command line gives."""
    if (sparsity, params, speedup) == (None, None, None):
        return recipe
    from penjing.pipeline.sizes import aimed

    return aimed(recipe, sparsity=sparsity, params=params, speedup=speedup)
