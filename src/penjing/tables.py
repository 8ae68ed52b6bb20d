"""What the command line shows on a terminal: a rich table for each kind of result.

Builders take the same plain data that `--json` prints, so that the two can never tell different stories.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from penjing.evaluation.size import readable_bytes, readable_seconds

Rows = list[dict[str, Any]]


def methods() -> Rows:
    """Every method: its family, its name, what it does, and its paper; their recipe keys are in the reference."""
    from penjing.methods import FAMILIES

    return [
        {"family": family, "name": method.name, "summary": method.summary, "paper": method.paper}
        for family, table in FAMILIES.items()
        for method in table
    ]


def recipes() -> Rows:
    """Every built-in recipe: name, summary, its steps and the format it writes."""
    from penjing.recipe import builtin_recipes, load_recipe

    return [
        {
            "name": name,
            "summary": recipe.summary,
            "steps": [step.method for step in recipe.steps],
            "format": recipe.format,
        }
        for name, recipe in ((name, load_recipe(name)) for name in builtin_recipes())
    ]


def formats() -> Rows:
    """Every format that can be written."""
    from penjing.formats import FORMATS

    return [{"name": name, "summary": format.summary} for name, format in FORMATS.items()]


def architectures() -> Rows:
    """Every model family whose facts are known; other decoders are inferred."""
    from penjing.models.families import FAMILIES

    return [{"model_type": model_type, "family": family} for model_type, family in FAMILIES.items()]


def engines() -> Rows:
    """Every engine, what it loads, its version here or how to install it."""
    from penjing.engines import ENGINES

    return [
        {"name": name, "summary": engine.summary, "here": engine.version() or f"no: {engine.install}"}
        for name, engine in ENGINES.items()
    ]


LISTINGS: dict[str, Callable[[], Rows]] = {
    "methods": methods,
    "recipes": recipes,
    "formats": formats,
    "architectures": architectures,
    "engines": engines,
}


def listing(rows: Rows) -> Table:
    """Rows of one listing, a column per key."""
    table = _table(*rows[0])
    for row in rows:
        table.add_row(*(escape(_words(value)) for value in row.values()))
    return table


def facts(result: Mapping[str, Any]) -> Table:
    """A result that is a handful of facts, one per line."""
    table = Table(show_header=False, box=None)
    for key, value in result.items():
        table.add_row(key.replace("_", " "), readable_bytes(value) if key.endswith("bytes") else escape(_words(value)))
    return table


def plan(result: Mapping[str, Any]) -> Group:
    """Output of `Plan.as_dict()`: one line per kind of matrix, the totals, the warnings."""
    matrices = {module["name"]: module for module in result["modules"] if len(module["shape"] or ()) > 1}
    table = _table("module", "count", "shape", "steps", "becomes", "bytes")
    for name, row in _rows(matrices, ("shape", "steps", "scheme")):
        size = readable_bytes(sum(module["bytes"] for module in row))
        steps = " + ".join(row[0]["steps"])
        table.add_row(name, str(len(row)), _shape(row[0]["shape"]), steps, row[0]["scheme"], size)
    rest = [module["bytes"] for module in result["modules"] if module["name"] not in matrices and module["bytes"]]
    table.add_row("norms and the like", str(len(rest)), "", "", "dense", readable_bytes(sum(rest)))
    size = readable_bytes(result["predicted_bytes"])
    ratio = result["dense_bytes"] / max(result["predicted_bytes"], 1)
    memory = result["predicted_peak_memory"]
    totals = {
        "format": result["format"],
        "blocks": f"{result['blocks'] - result['blocks_removed']} of {result['blocks']}",
        "predicted size": f"{size}, {ratio:.2f} times smaller than in {result['dtype']}",
        "predicted peak memory": f"{readable_bytes(sum(memory.values()))} above what the libraries take",
        "predicted time": f"{readable_seconds(result['predicted_seconds'])} of forward passes and statistics at least",
    }
    warnings = [f"[yellow]warning:[/] {escape(text)}" for text in result["warnings"]]
    return Group(table, "", facts(totals), *warnings)


def inspection(result: Mapping[str, Any]) -> Group:
    """Output of `Inspection.as_dict()`: the totals, and one line per kind of module."""
    shown = ("model", "model_type", "family", "format", "dtype", "bytes", "parameters", "blocks", "tied")
    modules = {module["name"]: module for module in result["modules"]}
    table = _table("module", "count", "kind", "shape", "parameters")
    for name, row in _rows(modules, ("kind", "shape", "parameters")):
        parameters = sum(module["parameters"] for module in row)
        table.add_row(name, str(len(row)), row[0]["kind"], _shape(row[0]["shape"]), f"{parameters:,}")
    inputs = _table("linears that read one activation", "it comes from", "engines merge them")
    for group in result["groups"]:
        inputs.add_row(", ".join(group["linears"]), group["source"] or "", "yes" if group["fused"] else "")
    reasons = [f"never compressed: {name}: {reason}" for name, reason in result["never"].items()]
    return Group(facts({key: result[key] for key in shown}), "", table, "", inputs, *map(escape, reasons))


def report(result: Mapping[str, Any]) -> Group:
    """Output of `Report.as_dict()`: dense model and result side by side, the protocol, what to know."""
    from penjing.evaluation.tables import summary_table

    return summary_table(result)


def allocation(result: Mapping[str, Any]) -> Group:
    """Output of `Allocation.as_dict()`: who got what, and what one choice for all would weigh and lose."""
    chosen = {name: {"choice": unit["choice"]} for unit in result["units"] for name in unit["modules"]}
    table = _table("linears", *result["choices"])
    for pattern, names in across_blocks(chosen).items():
        counts = [sum(chosen[name]["choice"] == choice for name in names) for choice in result["choices"]]
        table.add_row(pattern[max(pattern.find("*"), 0) :], *(str(count or "") for count in counts))
    losses = _table("choice", "size", "predicted loss")
    for row in result["uniform"]:
        size = readable_bytes(row["bytes"]) + ("" if row["fits"] else ", over the budget")
        losses.add_row(f"{row['choice']} everywhere", size, f"{row['loss']:.4g}")
    losses.add_row("this allocation", readable_bytes(result["predicted_bytes"]), f"{result['predicted_loss']:.4g}")
    totals = {
        "budget": _measured(result["budget"], result["measure"]),
        "taken": _measured(result["cost"], result["measure"]),
        "bits per weight": f"{result['bits_per_weight']:.3f} of these linears, scales included",
        "loss": result["loss_meaning"],
    }
    if searched := result["searched_kl"]:
        totals["search"] = f"KL {searched['before']:.4f} before, {searched['after']:.4f} after, in nats per token"
    return Group(table, "", losses, "", facts(totals))


def _measured(amount: int, measure: str) -> str:
    """An amount of bytes, of parameters, or of nanoseconds."""
    if measure == "bytes":
        return readable_bytes(amount)
    return f"{amount:,} parameters" if measure == "parameters" else f"{amount / 1e6:.2f} ms per token"


def sparsities(result: Mapping[str, Any]) -> Group:
    """Output of `Sparsities.as_dict()`: a line per block with its linears' sparsities, lowest to highest."""
    table = _table("sparsity", "linears")
    by_share: dict[float, list[str]] = {}
    for name, share in result["sparsities"].items():
        by_share.setdefault(share, []).append(name)
    for share, names in sorted(by_share.items()):
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        table.add_row(f"{share:.1%}", escape(names[0]) + more)
    totals = {"mean": f"{result['mean_sparsity']:.2%}", "predicted size": readable_bytes(result["predicted_bytes"])}
    return Group(table, "", facts(totals))


_RANK_LOSSES = {"output": "of squared outputs", "gradient": "nats per token, expected from gradients"}


def ranks(result: Mapping[str, Any]) -> Group:
    """Output of `Ranks.as_dict()`: a line per kind of linear with its lowest and highest rank."""
    table = _table("linears", "lowest rank", "highest", "left dense")
    found = {name: {"rank": rank} for name, rank in result["ranks"].items()}
    for pattern, names in across_blocks(found).items():
        given = [result["ranks"][name] for name in names]
        low, high = (choose(filter(None, given), default="") for choose in (min, max))
        table.add_row(pattern[max(pattern.find("*"), 0) :], str(low), str(high), str(given.count(None) or ""))
    totals = {
        "parameters kept": f"{result['parameters_kept'] / result['parameters']:.1%} of these linears",
        "predicted size": readable_bytes(result["predicted_bytes"]),
        "loss": f"{result['loss']:.4g} {_RANK_LOSSES[result['by']]}, summed",
    }
    return Group(table, "", facts(totals))


def evaluation(result: Mapping[str, Any]) -> Group:
    """Output of `Evaluation.as_dict()`."""
    return comparison([result])


def comparison(results: Sequence[Mapping[str, Any]]) -> Group:
    """Several evaluations on the same tokens, a line each, and the protocol they share."""
    if "classification" in results[0]:
        return _classifiers(results)
    table = _table("model", "size", "bits per weight", "perplexity", "KL, nats per token", "same top token")
    for result in results:
        table.add_row(
            escape(result["model"]),
            readable_bytes(result["bytes"]),
            f"{result['bits_per_weight']:.2f}",
            "" if result["perplexity"] is None else f"{result['perplexity']:.3f}",
            "" if result["kl"] is None else f"{result['kl']:.4f} ± {result['kl_error']:.4f}",
            "" if result["top1"] is None else f"{result['top1']:.1%}",
        )
    from penjing.evaluation.tables import cache_line, task_lines

    caches = [cache_line(result["kv_cache"]) for result in results[-1:] if result["kv_cache"]]
    return Group(table, "", *task_lines(results), *caches, escape(results[-1]["protocol"]["sentence"]))


def _classifiers(results: Sequence[Mapping[str, Any]]) -> Group:
    """Several classifiers on the same labelled texts."""
    table = _table("model", "size", "parameters", "accuracy", "same class", "KL, nats")
    for result in results:
        found = result["classification"]
        table.add_row(
            escape(result["model"]),
            readable_bytes(result["bytes"]),
            f"{result['parameters']:,}",
            f"{found['accuracy']:.1%}",
            "" if found["agreement"] is None else f"{found['agreement']:.1%}",
            "" if found["kl"] is None else f"{found['kl']:.4f}",
        )
    return Group(table, "", escape(results[-1]["classification"]["sentence"]))


def bench(result: Mapping[str, Any]) -> Group:
    """Output of `Bench.as_dict()`: a line per model, engine, batch size and prompt length; medians and quartiles."""
    table = _table("model", "engine", "batch", "prompt", "prefill, tokens/s", "decode, tokens/s", "of the limit")
    loading = _table(
        "model", "engine", "dtype", "files", "loads in", "peak memory", "reads per token", "limit, tokens/s"
    )
    for row in result["rows"]:
        name, engine = escape(row["model"]), f"{row['engine']} {row['version']}"
        for speed in row["speeds"]:
            limit = row["ceiling"] and f"{speed['decode']['median'] / row['ceiling'] / speed['batch']:.0%}"
            spreads = (_spread(speed["prefill"]), _spread(speed["decode"]))
            table.add_row(name, engine, str(speed["batch"]), str(speed["length"]), *spreads, limit or "")
        reads = readable_bytes(row["read_per_token"]) if row["read_per_token"] else ""
        sizes = (readable_bytes(row["file_bytes"]), f"{row['load_seconds']:.2f} s", readable_bytes(row["peak_memory"]))
        loading.add_row(name, engine, row["dtype"], *sizes, reads, f"{row['ceiling']:.0f}" if row["ceiling"] else "")
    rate = readable_bytes(result["bandwidth"])
    note = (
        f"{result['threads']} threads; memory is read at {rate}/s, which limits decoding at batch 1 to the last column."
    )
    return Group(table, "", loading, "", note, *(f"left out: {escape(reason)}" for reason in result["skipped"]))


def engine_check(result: Mapping[str, Any]) -> Group:
    """Output of `EngineCheck.as_dict()`: the totals, and the first positions with another likeliest token."""
    shown = {key: value for key, value in result.items() if key != "differences"}
    for key in ("kl", "top1", "largest"):
        shown[key] = "not known" if shown[key] is None else f"{shown[key]:.4g}"
    table = _table("window", "position", "likeliest token", "in the engine", "probabilities of both")
    for each in result["differences"]:
        chances = " and ".join(f"{chance:.4f}" for chance in each["probability"])
        table.add_row(*(str(each[key]) for key in ("window", "position", "expected", "found")), chances)
    return Group(facts(shown), "", table) if result["differences"] else Group(facts(shown))


def _spread(spread: Mapping[str, float]) -> str:
    digits = 0 if spread["median"] >= 100 else 1
    return f"{spread['median']:.{digits}f} ({spread['low']:.{digits}f} to {spread['high']:.{digits}f})"


def _rows(modules: Mapping[str, Mapping[str, Any]], keys: Sequence[str]) -> Iterator[tuple[str, list[Any]]]:
    """What to call a line and the modules it stands for: alike in `keys`, and in name but for the block number."""
    for pattern, names in across_blocks(modules).items():
        alike: dict[str, list[Mapping[str, Any]]] = {}
        for name in names:
            alike.setdefault(str([modules[name][key] for key in keys]), []).append(modules[name])
        for row in alike.values():
            yield (row[0]["name"] if len(row) == 1 else pattern[pattern.index("*") :]), row


def _shape(shape: Sequence[int] | None) -> str:
    return "x".join(map(str, shape or ()))


def across_blocks(names: Iterable[str]) -> dict[str, list[str]]:
    """Module names gathered by what is left when the block number is a star, in order of appearance.

    >>> across_blocks(["layers.0.mlp", "layers.1.mlp", "head"])
    {'layers.*.mlp': ['layers.0.mlp', 'layers.1.mlp'], 'head': ['head']}
    """
    gathered: dict[str, list[str]] = {}
    for name in names:
        gathered.setdefault(re.sub(r"\.\d+\.", ".*.", name, count=1), []).append(name)
    return gathered


def _table(*columns: str) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    for position, column in enumerate(columns):
        table.add_column(column.replace("_", " "), no_wrap=position == 0 or column in ("shape", "bytes"))
    return table


def _words(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={item}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(str(item) for item in value)
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
