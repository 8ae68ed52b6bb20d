"""The `penjing` command: verbs over `penjing.api`, tables on a terminal, JSON for programs.

Exit codes: 0 done; 1 a bug in Penjing; 2 bad input; 3 the written model failed verification; 4 the result is worse
than the recipe's `require` section allows; 130 interrupted. Standard output carries the result and nothing else;
progress and errors go to standard error. Heavy imports happen inside verbs, so that help is instant.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.markup import escape

from penjing import __version__
from penjing.errors import PenjingError

if TYPE_CHECKING:
    from rich.progress import TaskID

    from penjing.methods.quantization.kivi import KVCache
    from penjing.recipe import Recipe

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

MODEL_HELP = "`demo`, a model directory, a .gguf file, or a hub id"
RECIPE_HELP = "a built-in recipe (see `penjing list recipes`) or a YAML file"

ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
RecipeOption = Annotated[str, typer.Option("--recipe", "-r", metavar="RECIPE", help=RECIPE_HELP)]
JsonOption = Annotated[bool, typer.Option("--json", help="print the result as JSON")]
TrustOption = Annotated[bool, typer.Option("--trust-remote-code", help="run model code that comes with the checkpoint")]
FormatOption = Annotated[str | None, typer.Option(metavar="FORMAT", help="override the recipe's format")]
DataOption = Annotated[str | None, typer.Option(metavar="TEXT", help="override the recipe's calibration data")]
SamplesOption = Annotated[int | None, typer.Option(min=1, help="override the number of calibration windows")]
LengthOption = Annotated[int | None, typer.Option(min=2, help="override the tokens per calibration window")]
SeedOption = Annotated[int | None, typer.Option(min=0, help="override the calibration seed")]
EvalDataOption = Annotated[
    str, typer.Option("--data", metavar="TEXT", help="as in a recipe: `builtin`, a file, a directory")
]
WindowsOption = Annotated[int, typer.Option("--windows", min=1, help="windows of text to evaluate on")]
EvalLengthOption = Annotated[int, typer.Option("--length", min=2, help="tokens per window")]
KVBitsOption = Annotated[
    int | None, typer.Option("--kv-bits", help="read the past through a KV cache of 2, 3, 4 or 8 bits")
]
KVGroupOption = Annotated[int | None, typer.Option("--kv-group", help="tokens or channels that share a scale  [32]")]
KVResidualOption = Annotated[int | None, typer.Option("--kv-residual", help="newest tokens kept in full  [128]")]


class SensitivityName(StrEnum):
    """How `penjing allocate` estimates losses."""

    output = "output"
    gradient = "gradient"
    kl = "kl"


class Listing(StrEnum):
    """What `penjing list` can list."""

    methods = "methods"
    recipes = "recipes"
    formats = "formats"
    architectures = "architectures"


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"penjing {__version__}")
        raise typer.Exit


@app.callback()
def penjing(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print it")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="show the traceback of an error")] = False,
) -> None:
    """Make large language models small: plan first, compress block by block, verify what was written."""


@app.command()
def inspect(model: ModelArgument, as_json: JsonOption = False, trust_remote_code: TrustOption = False) -> None:
    """Show what a model is made of; reads headers, no weights."""
    from penjing import api, tables

    with _working():
        result = api.inspect(model, trust_remote_code=trust_remote_code)
    _show(result.as_dict(), tables.inspection, as_json)


@app.command("list")
def list_(what: Annotated[Listing, typer.Argument(help="what to list")], as_json: JsonOption = False) -> None:
    """List what Penjing knows."""
    from penjing import tables

    _show(tables.LISTINGS[what](), tables.listing, as_json)


@app.command()
def plan(
    model: ModelArgument,
    recipe: RecipeOption,
    data: DataOption = None,
    samples: SamplesOption = None,
    length: LengthOption = None,
    format: FormatOption = None,
    seed: SeedOption = None,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Say what a recipe would do to a model, tensor by tensor, and every problem; reads no weights."""
    from penjing import api, tables

    chosen = _recipe(recipe, format, data=data, samples=samples, length=length, seed=seed)
    with _working():
        result = api.plan(model, chosen, trust_remote_code=trust_remote_code)
    _show(result.as_dict(), tables.plan, as_json)


@app.command()
def allocate(
    model: ModelArgument,
    recipe: RecipeOption,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="a new file for the recipe")],
    budget: Annotated[str | None, typer.Option("--bytes", metavar="SIZE", help="of the whole model: 80MB")] = None,
    bits: Annotated[float | None, typer.Option(min=0, help="per weight of the linears, scales included")] = None,
    choices: Annotated[
        str, typer.Option(metavar="LIST", help="bits, bits with a group size (3g64), `dense`")
    ] = "2,3,4,6,8",
    by: Annotated[
        SensitivityName,
        typer.Option(help="estimate of losses: relative output error, expected from gradients, measured KL"),
    ] = SensitivityName.gradient,
    data: DataOption = None,
    samples: SamplesOption = None,
    length: LengthOption = None,
    format: FormatOption = None,
    seed: SeedOption = None,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Choose bits for every linear within a budget, by measured losses; writes a recipe for `compress`."""
    from penjing import api, tables

    chosen = _recipe(recipe, format, data=data, samples=samples, length=length, seed=seed)
    with _working() as progress:
        result = api.allocate(
            model,
            chosen,
            budget=budget,
            bits=bits,
            choices=choices,
            by=by.value,
            output=output,
            progress=progress,
            trust_remote_code=trust_remote_code,
        )
    _show(result.as_dict(), tables.allocation, as_json)


@app.command()
def compress(
    model: ModelArgument,
    recipe: RecipeOption,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="a new directory, or one to resume in")],
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
    with _working() as progress:
        report = api.compress(
            model, chosen, output, progress=progress, evaluated=evaluated, trust_remote_code=trust_remote_code
        )
    _show(report.as_dict(), tables.report, as_json)


@app.command("eval")
def evaluate(
    model: ModelArgument,
    against: Annotated[str | None, typer.Option(metavar="MODEL", help="the model to compare with")] = None,
    data: EvalDataOption = "builtin",
    windows: WindowsOption = 8,
    length: EvalLengthOption = 2048,
    kv_bits: KVBitsOption = None,
    kv_group: KVGroupOption = None,
    kv_residual: KVResidualOption = None,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Measure a model: perplexity, and what changed against another model."""
    from penjing import api, tables

    with _working() as progress:
        result = api.evaluate(
            model,
            against=against,
            data=data,
            windows=windows,
            length=length,
            kv_cache=_kv_cache(kv_bits, kv_group, kv_residual),
            progress=progress,
            trust_remote_code=trust_remote_code,
        )
    _show(result.as_dict(), tables.evaluation, as_json)


@app.command()
def compare(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="the first one is the reference")],
    data: EvalDataOption = "builtin",
    windows: WindowsOption = 8,
    length: EvalLengthOption = 2048,
    kv_bits: KVBitsOption = None,
    kv_group: KVGroupOption = None,
    kv_residual: KVResidualOption = None,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Measure several models on the same text, against the first, in one table."""
    from penjing import api, tables

    with _working() as progress:
        results = api.compare(
            models,
            data=data,
            windows=windows,
            length=length,
            kv_cache=_kv_cache(kv_bits, kv_group, kv_residual),
            progress=progress,
            trust_remote_code=trust_remote_code,
        )
    _show([result.as_dict() for result in results], tables.comparison, as_json)


@app.command()
def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="a directory that `penjing compress` wrote")],
    as_json: JsonOption = False,
) -> None:
    """Load a written model back as a user would and compare it with what its report promises."""
    from penjing import api, tables

    with _working() as progress:
        result = api.verify(directory, progress=progress)
    _show(result.as_dict(), tables.facts, as_json)


def _kv_cache(bits: int | None, group_size: int | None, residual: int | None) -> KVCache | None:
    """The cache that the options describe, if any of them is given."""
    if bits is None and group_size is None and residual is None:
        return None
    from penjing.methods.quantization.kivi import KVCache

    return KVCache.of(bits=bits, group_size=group_size, residual=residual)


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


def _show(result: Any, table: Callable[[Any], RenderableType], as_json: bool) -> None:
    """Print the result on standard output: strict JSON (infinities become null), or a table as wide as the terminal."""
    if as_json:
        strict = json.loads(json.dumps(result), parse_constant=lambda _: None)
        print(json.dumps(strict, indent=2, ensure_ascii=False))
    else:
        Console().print(table(result))


@contextmanager
def _working() -> Iterator[Callable[..., None]]:
    """Progress bars on standard error; whatever libraries print meanwhile goes there too, never into the result.

    Yields `progress(stage, done, total, detail="")`.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    name, detail = TextColumn("{task.description}"), TextColumn("{task.fields[detail]}")
    bar = Progress(name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), detail, console=_stderr())
    bars: dict[str, TaskID] = {}
    with redirect_stdout(sys.stderr), bar as shown:

        def progress(stage: str, done: int, total: int, detail: str = "") -> None:
            if stage not in bars:
                bars[stage] = shown.add_task(stage, total=total, detail=detail)
            shown.update(bars[stage], completed=done, total=total, detail=detail)

        try:
            yield progress
        except KeyboardInterrupt:
            _complain("interrupted")
            raise typer.Exit(130) from None


def _stderr() -> Console:
    return Console(stderr=True)


def _complain(message: str) -> None:
    _stderr().print("[bold red]error:[/]", escape(message), soft_wrap=True, highlight=False)


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; never raises for a failed run."""
    given = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in given
    try:
        app([word for word in given if word != "--debug"], prog_name="penjing")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 0
    except PenjingError as error:
        if debug:
            traceback.print_exc()
        _complain(str(error))
        return error.exit_code
    except Exception as error:
        if debug:
            traceback.print_exc()
        _complain(
            f"{type(error).__name__}: {error} (this is a bug in Penjing {__version__}; "
            "run again with --debug and report the traceback with the recipe and the model's config.json)"
        )
        return 1
    return 0
