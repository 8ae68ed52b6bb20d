"""What goes where: the result to standard output, progress and errors to standard error."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console, RenderableType
from rich.markup import escape

if TYPE_CHECKING:
    from rich.progress import TaskID


def show(result: Any, table: Callable[[Any], RenderableType], as_json: bool) -> None:
    """Print the result on standard output: strict JSON (infinities become null), or a table as wide as the terminal."""
    if as_json:
        show_json(result)
    else:
        Console().print(table(result))


def show_json(result: Any) -> None:
    """Print strict JSON."""
    strict = json.loads(json.dumps(result), parse_constant=lambda _: None)
    print(json.dumps(strict, indent=2, ensure_ascii=False))


@contextmanager
def working() -> Iterator[Callable[..., None]]:
    """Progress bars on standard error; whatever libraries print meanwhile goes there too, never into the result.

    Yields `progress(stage, done, total, detail="")`.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    name, detail = TextColumn("{task.description}"), TextColumn("{task.fields[detail]}")
    bar = Progress(name, BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), detail, console=_stderr())
    bars: dict[str, TaskID] = {}
    with redirect_stdout(sys.stderr), ExitStack() as shown:

        def progress(stage: str, done: int, total: int, detail: str = "") -> None:
            if not bars:
                shown.enter_context(bar)  # not before: without a line to show it leaves an empty one
            if stage not in bars:
                bars[stage] = bar.add_task(stage, total=total, detail=detail)
            bar.update(bars[stage], completed=done, total=total, detail=detail)

        try:
            yield progress
        except KeyboardInterrupt:
            complain("interrupted")
            raise typer.Exit(130) from None


def _stderr() -> Console:
    return Console(stderr=True)


def complain(message: str) -> None:
    """One line about what went wrong, on standard error."""
    _stderr().print("[bold red]error:[/]", escape(message), soft_wrap=True, highlight=False)
