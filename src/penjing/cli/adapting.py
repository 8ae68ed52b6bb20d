"""Verbs on what is learnt beside a model: adapters in PEFT's format, and tasks that are scales."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from penjing.cli.options import JsonOption, ModelArgument, TrustOption
from penjing.cli.output import show, working

adapter = typer.Typer(no_args_is_help=True, help="Train, merge and look at adapters in PEFT's format.")
task = typer.Typer(no_args_is_help=True, help="Keep what PEQA taught a quantised model as a small file, and switch.")

AdapterArgument = Annotated[Path, typer.Argument(metavar="ADAPTER", help="a directory that PEFT or Penjing wrote")]
OutputOption = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="a new directory")]


@adapter.command()
def train(
    model: ModelArgument,
    output: OutputOption,
    data: Annotated[str, typer.Option(metavar="TEXT", help="text, or records of prompts and responses, to learn")],
    rank: Annotated[int, typer.Option(min=1, help="of the change of each linear")] = 16,
    kind: Annotated[str, typer.Option(help="lora, rslora or dora")] = "lora",
    start: Annotated[str, typer.Option(help="zero, or residual: with what quantisation lost")] = "zero",
    dense: Annotated[str | None, typer.Option(metavar="MODEL", help="with --start residual: the dense model")] = None,
    steps: Annotated[int, typer.Option(min=1, help="of the optimiser")] = 100,
    batch: Annotated[int, typer.Option(min=1, help="windows or pairs per step")] = 8,
    length: Annotated[int, typer.Option(min=2, help="tokens per window or pair")] = 512,
    learning_rate: Annotated[float, typer.Option(min=0, help="at its highest")] = 2e-4,
    as_json: JsonOption = False,
) -> None:
    """Train an adapter on a dense model, or on one in NF4 (QLoRA). Killed? Run the same command again: it resumes."""
    from penjing import tables
    from penjing.training.adapters import adapter_options, train_adapter
    from penjing.training.merging import describe_adapter

    keys = {"rank": rank, "alpha": 2.0 * rank, "start": start, "steps": steps, "batch_size": batch, "length": length}
    options = adapter_options(kind, data=data, learning_rate=learning_rate, **keys)
    with working() as progress:
        curve = train_adapter(model, output, options, dense=dense, progress=progress)
        result = describe_adapter(output)
    losses = {"first_loss": curve.losses[0], "last_loss": curve.losses[-1]}
    show({**result, **losses}, tables.facts, as_json)


@adapter.command()
def merge(
    model: ModelArgument,
    adapter: AdapterArgument,
    output: OutputOption,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Write the model with the adapter in its weights. Zeros of a pruned model stay; codes are refused."""
    from penjing import tables
    from penjing.training.merging import merge_adapter

    with working():
        result = merge_adapter(model, adapter, output, trust_remote_code=trust_remote_code)
    show(result.as_dict(), tables.facts, as_json)


@adapter.command("show")
def show_adapter(adapter: AdapterArgument, as_json: JsonOption = False) -> None:
    """Say what is in an adapter."""
    from penjing import tables
    from penjing.training.merging import describe_adapter

    with working():
        result = describe_adapter(adapter)
    show(result, tables.facts, as_json)


@task.command()
def save(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="the quantised model")],
    tuned: Annotated[Path, typer.Argument(metavar="TUNED", help="the same codes with other scales")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="a new .safetensors file")],
    as_json: JsonOption = False,
) -> None:
    """Keep the scales in which a tuned model differs from its base."""
    from penjing import tables
    from penjing.training.task_scales import save_task

    with working():
        size = save_task(base, tuned, output)
    show({"task": str(output), "bytes": size}, tables.facts, as_json)


@task.command("apply")
def apply(
    model: Annotated[Path, typer.Argument(metavar="DIR", help="a quantised model, whose scales are replaced")],
    file: Annotated[Path, typer.Argument(metavar="TASK", help="a file that `penjing task save` wrote")],
    as_json: JsonOption = False,
) -> None:
    """Give a model the scales of a task; its codes are not touched."""
    from penjing import tables
    from penjing.training.task_scales import apply_task

    with working():
        apply_task(model, file)
    show({"model": str(model), "task": str(file)}, tables.facts, as_json)
