"""Verbs that run models where people run them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from penjing.cli.options import MODEL_HELP, EngineOption, JsonOption, ModelArgument, ThreadsOption, TrustOption
from penjing.cli.output import show, show_json, working


def verify(
    model: Annotated[str, typer.Argument(metavar="DIR", help="a directory that `penjing compress` wrote")],
    engine: EngineOption = None,
    against: Annotated[
        str | None, typer.Option(metavar="MODEL", help="with --engine: whose weights to compare with  [its own]")
    ] = None,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Load a written model back as a user would and compare it with what its report promises.

    With --engine: load any model in that engine and compare its logits with those that Penjing computes.
    """
    from penjing import api, tables

    with working() as progress:
        result = api.verify(
            model, engine=engine, against=against, progress=progress, trust_remote_code=trust_remote_code
        )
    show(result.as_dict(), tables.facts if engine is None else tables.engine_check, as_json)


def export(
    model: ModelArgument,
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="see `penjing list formats`")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="a new directory")],
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Write a model in another format, with the codes that it has: nothing is quantised anew."""
    from penjing import api, tables

    with working() as progress:
        result = api.export(model, to, output, progress=progress, trust_remote_code=trust_remote_code)
    show(result.as_dict(), tables.facts, as_json)


def bench(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help=MODEL_HELP)],
    engines: Annotated[
        list[str] | None,
        typer.Option("--engine", "-e", metavar="ENGINE[:DTYPE]", help="may be given more than once  [by the files]"),
    ] = None,
    batch: Annotated[str, typer.Option(metavar="LIST", help="batch sizes")] = "1",
    length: Annotated[str, typer.Option(metavar="LIST", help="prompt lengths in tokens")] = "128,512",
    steps: Annotated[int, typer.Option(min=1, help="tokens decoded after each prompt")] = 32,
    rounds: Annotated[int, typer.Option(min=1, help="over all models in turn, after one that warms up")] = 5,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Time models in the engines that run them: prefill, decode, loading, memory, and the limit of memory bandwidth."""
    from penjing import api, tables
    from penjing.engines.bench import Load

    load = Load(numbers(batch, "--batch"), numbers(length, "--length"), steps, rounds)
    with working() as progress:
        result = api.bench(
            models,
            engines or (),
            load=load,
            threads=threads,
            progress=progress,
            trust_remote_code=trust_remote_code,
        )
    show(result.as_dict(), tables.bench, as_json)


def serve(
    model: ModelArgument,
    port: Annotated[int, typer.Option(min=1, max=65535, help="of this machine")] = 8000,
    context: Annotated[int, typer.Option(min=16, help="tokens that prompt and answer may take")] = 4096,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Print the commands that serve a model: llama-server, vLLM, transformers. Starts nothing."""
    from penjing import api

    with working():
        result = api.serve(model, port=port, context=context, threads=threads, trust_remote_code=trust_remote_code)
    if as_json:
        show_json(result.as_dict())
        return
    for command in result.commands:  # plain lines, to be copied
        print(f"# {command.engine}: {command.note}" if command.note else f"# {command.engine}")
        print(command.command)
    print(f"# then talk to {result.address} as to OpenAI's")


def numbers(text: str, option: str) -> tuple[int, ...]:
    """ "1,4" -> (1, 4). Raises BadParameter, which ends in exit code 2."""
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise typer.BadParameter(f"{option} takes positive numbers with commas between them, not {text!r}")
    return found
