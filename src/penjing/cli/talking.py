"""`penjing chat`: answers as they come, of one model or of two side by side."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from penjing.cli.options import EngineOption, JsonOption, ModelArgument, ThreadsOption, TrustOption
from penjing.cli.output import show_json, working

if TYPE_CHECKING:
    from penjing.engines.base import Sampling
    from penjing.engines.chat import Talk


def chat(
    model: ModelArgument,
    engine: EngineOption = None,
    against: Annotated[str | None, typer.Option(metavar="MODEL", help="a second model, answering side by side")] = None,
    against_engine: Annotated[
        str | None, typer.Option(metavar="ENGINE", help="for the second model  [by the files]")
    ] = None,
    prompt: Annotated[str | None, typer.Option("--prompt", "-p", help="ask this and end  [a conversation]")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="of an answer at most")] = 256,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the likeliest token every time")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="share of the probability to draw from")] = 0.95,
    seed: Annotated[int, typer.Option(min=0, help="of the draws")] = 0,
    context: Annotated[int, typer.Option(min=16, help="tokens that conversation and answer may take")] = 2048,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Talk to a model in its engine; --against puts a second one beside it. Ends with an empty line."""
    from penjing.engines.base import Sampling
    from penjing.engines.chat import Talk

    sampling = Sampling(tokens, temperature, top_p, seed)
    wanted: list[tuple[str, str | None]] = [(model, engine)]
    if against is not None:
        wanted.append((against, against_engine))
    with ExitStack() as stack:
        talks = []
        with working() as progress:
            for number, (name, runs_in) in enumerate(wanted):
                progress("load", number, len(wanted), name)
                talk = Talk(name, runs_in, threads=threads, context=context, trust_remote_code=trust_remote_code)
                talks.append(stack.enter_context(talk))
            progress("load", len(wanted), len(wanted), "")
        for question in _questions() if prompt is None else (prompt,):
            if as_json:
                for talk in talks:
                    "".join(talk.say(question, sampling))
                show_json({"prompt": question, "answers": [talk.last.as_dict() for talk in talks]})
            else:
                _answer(talks, question, sampling)


def _questions() -> Iterator[str]:
    """Lines that are typed, or piped in, up to an empty one."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        yield line


def _answer(talks: list[Talk], question: str, sampling: Sampling) -> None:
    """One model: its words as they come. Two: columns, a piece of each in turn."""
    console = Console()
    if len(talks) == 1:
        for piece in talks[0].say(question, sampling):
            console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        console.print()
    else:
        texts = [""] * len(talks)
        streams = [talk.say(question, sampling) for talk in talks]
        with Live(_columns(talks, texts), console=console, vertical_overflow="visible") as live:
            while pieces := [(index, piece) for index, stream in enumerate(streams) if (piece := next(stream, ""))]:
                for index, piece in pieces:
                    texts[index] += piece
                live.update(_columns(talks, texts))
    for talk in talks:
        rate = f"{talk.last.tokens} tokens, {talk.last.tokens_per_second:.1f} per second"
        console.print(f"[dim]{escape(talk.model)} in {talk.engine}: {rate}[/]", highlight=False)


def _columns(talks: list[Talk], texts: list[str]) -> Table:
    table = Table(show_edge=False, expand=True)
    for talk in talks:
        table.add_column(f"{escape(talk.model)} in {talk.engine}", ratio=1)
    table.add_row(*map(escape, texts))
    return table
