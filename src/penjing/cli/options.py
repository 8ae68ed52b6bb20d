"""Arguments and options that several verbs share."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

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
SparsityOption = Annotated[
    float | None, typer.Option(min=0, max=1, help="how much the pruning step removes, as a fraction")
]
ParamsOption = Annotated[
    str | None,
    typer.Option(metavar="COUNT", help="parameters of the result, at most: 100M; of a step that removes parts"),
]
SpeedupOption = Annotated[
    float | None, typer.Option(min=1, help="how many times faster to decode, by latencies measured on this machine")
]
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
TasksOption = Annotated[
    list[str] | None,
    typer.Option("--tasks", metavar="TASK", help="what to answer: a task of lm-eval, or a .jsonl file; repeatable"),
]
LimitOption = Annotated[int | None, typer.Option("--limit", min=1, help="ask the first so many questions of each task")]

EngineOption = Annotated[
    str | None, typer.Option("--engine", "-e", metavar="ENGINE", help="see `penjing list engines`  [by the files]")
]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="of the engine  [OMP_NUM_THREADS, or one per core]")]


class SensitivityName(StrEnum):
    """How `penjing allocate` estimates losses."""

    output = "output"
    gradient = "gradient"
    kl = "kl"


class RankLossName(StrEnum):
    """How `penjing ranks` estimates losses."""

    gradient = "gradient"
    output = "output"


class SparsityName(StrEnum):
    """How `penjing distribute` tells blocks or linears apart."""

    owl = "owl"
    magnitude = "magnitude"


class Listing(StrEnum):
    """What `penjing list` can list."""

    methods = "methods"
    recipes = "recipes"
    formats = "formats"
    architectures = "architectures"
    engines = "engines"
