"""The command with its verbs, and how a run ends."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer

from penjing import __version__
from penjing.cli import adapting, compressing, measuring, running, talking
from penjing.cli.output import complain
from penjing.errors import PenjingError
from penjing.memory import ask_for_huge_pages, configure_heap

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


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


VERBS: dict[str, Callable[..., Any]] = {
    "inspect": compressing.inspect,
    "list": compressing.list_,
    "plan": compressing.plan,
    "allocate": compressing.allocate,
    "distribute": compressing.distribute,
    "ranks": compressing.ranks,
    "compress": compressing.compress,
    "eval": measuring.evaluate,
    "compare": measuring.compare,
    "verify": running.verify,
    "export": running.export,
    "bench": running.bench,
    "chat": talking.chat,
    "serve": running.serve,
}
"""In the order that `penjing --help` shows."""

for _name, _verb in VERBS.items():
    app.command(_name)(_verb)
app.add_typer(adapting.adapter, name="adapter")
app.add_typer(adapting.task, name="task")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; never raises for a failed run."""
    ask_for_huge_pages()
    configure_heap()
    given = list(sys.argv[1:] if args is None else args)
    debug = "--debug" in given
    try:
        app([word for word in given if word != "--debug"], prog_name="penjing")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else 0
    except PenjingError as error:
        if debug:
            traceback.print_exc()
        complain(str(error))
        return error.exit_code
    except Exception as error:
        if debug:
            traceback.print_exc()
        complain(
            f"{type(error).__name__}: {error} (this is a bug in Penjing {__version__}; "
            "run again with --debug and report the traceback with the recipe and the model's config.json)"
        )
        return 1
    return 0
