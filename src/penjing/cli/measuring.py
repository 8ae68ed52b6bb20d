"""Verbs that measure what was lost."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from penjing.cli.options import (
    EvalDataOption,
    EvalLengthOption,
    JsonOption,
    KVBitsOption,
    KVGroupOption,
    KVResidualOption,
    LimitOption,
    ModelArgument,
    TasksOption,
    TrustOption,
    WindowsOption,
)
from penjing.cli.output import show, working

if TYPE_CHECKING:
    from penjing.methods.quantization.kivi import KVCache


def evaluate(
    model: ModelArgument,
    against: Annotated[str | None, typer.Option(metavar="MODEL", help="the model to compare with")] = None,
    data: EvalDataOption = "builtin",
    windows: WindowsOption = 8,
    length: EvalLengthOption = 2048,
    kv_bits: KVBitsOption = None,
    kv_group: KVGroupOption = None,
    kv_residual: KVResidualOption = None,
    tasks: TasksOption = None,
    limit: LimitOption = None,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Measure a model: perplexity (a classifier: accuracy), and what changed against another model."""
    from penjing import api, tables

    with working() as progress:
        result = api.evaluate(
            model,
            against=against,
            data=data,
            windows=windows,
            length=length,
            kv_cache=_kv_cache(kv_bits, kv_group, kv_residual),
            tasks=tasks or (),
            limit=limit,
            progress=progress,
            trust_remote_code=trust_remote_code,
        )
    show(result.as_dict(), tables.evaluation, as_json)


def compare(
    models: Annotated[list[str], typer.Argument(metavar="MODEL...", help="the first one is the reference")],
    data: EvalDataOption = "builtin",
    windows: WindowsOption = 8,
    length: EvalLengthOption = 2048,
    kv_bits: KVBitsOption = None,
    kv_group: KVGroupOption = None,
    kv_residual: KVResidualOption = None,
    tasks: TasksOption = None,
    limit: LimitOption = None,
    as_json: JsonOption = False,
    trust_remote_code: TrustOption = False,
) -> None:
    """Measure several models on the same text, against the first, in one table."""
    from penjing import api, tables

    with working() as progress:
        results = api.compare(
            models,
            data=data,
            windows=windows,
            length=length,
            kv_cache=_kv_cache(kv_bits, kv_group, kv_residual),
            tasks=tasks or (),
            limit=limit,
            progress=progress,
            trust_remote_code=trust_remote_code,
        )
    show([result.as_dict() for result in results], tables.comparison, as_json)


def _kv_cache(bits: int | None, group_size: int | None, residual: int | None) -> KVCache | None:
    """The cache that the options describe, if any of them is given."""
    if bits is None and group_size is None and residual is None:
        return None
    from penjing.methods.quantization.kivi import KVCache

    return KVCache.of(bits=bits, group_size=group_size, residual=residual)
