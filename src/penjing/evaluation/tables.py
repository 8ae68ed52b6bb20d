"""A report on a terminal. Takes the plain data of `Report.as_dict()`, which is also what `--json` prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from penjing.evaluation.report import Report, method_names
from penjing.evaluation.size import readable_bytes, readable_seconds


def _plain(report: Report | Mapping[str, Any]) -> Mapping[str, Any]:
    return report.as_dict() if isinstance(report, Report) else report


def summary_table(report: Report | Mapping[str, Any]) -> Group:
    """The dense model beside the result: size, perplexity, KL, agreement; under it the protocol and what to know."""
    data = _plain(report)
    if data["classification"]:
        return Group(classification_table(data), "", *_remarks(data))
    source = data["source"]
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("model", "size", "bits per weight", "perplexity", "KL, nats per token", "same top token"):
        table.add_column(column, justify="left" if column == "model" else "right")
    quality = data["quality"] or {}
    dense_bits = f"{8 * source['bytes'] / source['parameters']:.2f}"
    dense_perplexity = _number(quality.get("reference_perplexity"))
    table.add_row(f"{escape(source['label'])} (dense)", readable_bytes(source["bytes"]), dense_bits, dense_perplexity)
    steps = " + ".join(method_names(data["recipe"]))
    kl, top1 = quality.get("kl"), quality.get("top1")
    table.add_row(
        escape(steps),
        readable_bytes(data["bytes"]),
        f"{data['bits_per_weight']:.2f}",
        _number(quality.get("perplexity")),
        "" if kl is None else f"{kl:.4f} ± {quality['kl_error']:.4f}",
        "" if top1 is None else f"{top1:.1%}",
    )
    return Group(table, "", *_remarks(data))


def classification_table(data: Mapping[str, Any]) -> Table:
    """Every model of a run that made a classifier: the step it came from, parameters, accuracy."""
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("model", "parameters", "accuracy", "same class", "KL, nats"):
        table.add_column(column, justify="left" if column == "model" else "right")
    table.add_row(escape(data["source"]["label"]), f"{data['source']['parameters']:,}", "", "", "")
    for number, entry in enumerate(data["made"], 1):
        accuracy = f"{entry['accuracy']:.1%}" if "accuracy" in entry else ""
        against = ["", ""]
        found = data["classification"]
        if number == len(data["made"]) and found["agreement"] is not None:
            against = [f"{found['agreement']:.1%}", f"{found['kl']:.4f}"]
        table.add_row(escape(entry["step"]["method"]), f"{entry['parameters']:,}", accuracy, *against)
    return table


def cache_line(held: Mapping[str, Any]) -> str:
    """What a quantised KV cache saves, in a line."""
    ratio = held["full_bytes"] / held["bytes"]
    return (
        f"KV cache of {held['tokens']} tokens: {readable_bytes(held['bytes'])}, {ratio:.2f} times smaller than full "
        f"{readable_bytes(held['full_bytes'])}; {held['token_bytes']:,.0f} bytes for a further token, "
        f"in full {held['full_token_bytes']:,.0f}"
    )


def task_lines(results: Sequence[Mapping[str, Any]]) -> list[RenderableType]:
    """What evaluated models reached on tasks: a column per task, a line per model and measure, the protocols.

    After ± stands the standard error, in brackets the difference to the first model, and last what guessing reaches.
    """
    first = {(score["name"], score["metric"]): score for score in results[0]["tasks"]}
    if not first:
        return []
    names, metrics = (list(dict.fromkeys(key[part] for key in first)) for part in (0, 1))
    metrics.sort(key=lambda metric: not metric.startswith("acc"))
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("model", "measure", *names):
        table.add_column(escape(column), justify="left" if column in ("model", "measure") else "right")
    for result in results:
        scores = {(score["name"], score["metric"]): score for score in result["tasks"]}
        for number, metric in enumerate(metrics):
            cells = []
            for name in names:
                score, base = scores.get((name, metric)), None if result is results[0] else first.get((name, metric))
                cells.append("" if score is None else _score(score, base))
            table.add_row("" if number else escape(result["model"]), escape(metric), *cells)
    chances = {name: score["chance"] for (name, _), score in first.items() if score["chance"] is not None}
    if chances:
        table.add_row("guessing", "acc", *(f"{chances[name]:.1%}" if name in chances else "" for name in names))
    protocols = dict.fromkeys(score["protocol"] for score in first.values())
    return [table, "", *(escape(protocol) for protocol in protocols)]


def _score(score: Mapping[str, Any], base: Mapping[str, Any] | None) -> str:
    """`45.2% ± 1.0 (-2.3)`: accuracies in percent and percentage points, everything else as it is."""
    scale, unit, form = (100, "%", ".1f") if score["metric"].startswith("acc") else (1, "", ".4g")
    error = "" if score["stderr"] is None else f" ± {scale * score['stderr']:{form}}"
    change = "" if base is None else f" ({scale * (score['value'] - base['value']):+{form}})"
    return f"{scale * score['value']:{form}}{unit}{error}{change}"


def _remarks(data: Mapping[str, Any]) -> list[str]:
    protocol = escape((data["protocol"] or data["classification"] or {"sentence": "not measured"})["sentence"])
    lines = [f"[dim]{protocol}[/]"]
    surplus = data["bytes"] - data["predicted_bytes"]
    lines.append(f"predicted {readable_bytes(data['predicted_bytes'])}, written {surplus:+,} bytes from that")
    if data["kv_cache"]:
        lines.append(cache_line(data["kv_cache"]))
    if data["verification"]:
        checked = data["verification"]
        difference = checked.get("difference", 0.0)
        lines.append(f"verified: loaded back ({checked.get('how', '')}), logits differ by {difference:.1e}")
    took = ", ".join(f"{name} {readable_seconds(seconds)}" for name, seconds in data["seconds"].items())
    if data["peak_memory"] is not None:
        took += f"{'; ' if took else ''}peak memory {readable_bytes(data['peak_memory'])} above the libraries"
    lines += [took] if took else []
    lines += [f"[yellow]{escape(entry['name'])}[/]: {escape(entry['reason'])}" for entry in data["skipped"]]
    return lines


def layers_table(report: Report | Mapping[str, Any]) -> Table:
    """One line per module that a step touched or that carries a note, the largest error first."""
    data = _plain(report)
    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in ("module", "shape", "steps", "becomes", "bytes", "relative error", "of", "notes"):
        right = column in ("bytes", "relative error")
        table.add_column(column, justify="right" if right else "left", no_wrap=column == "module")
    rows = [row for row in data["modules"] if row["steps"] or row["notes"]]
    for row in sorted(rows, key=lambda row: -(row["error"] or 0.0)):
        table.add_row(
            escape(row["name"]),
            " x ".join(map(str, row["shape"])),
            " + ".join(row["steps"]),
            escape(row["scheme"]),
            readable_bytes(row["bytes"]),
            "" if row["error"] is None else f"{row['error']:.4f}",
            row["error_kind"],
            escape("; ".join(row["notes"])),
        )
    return table


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
