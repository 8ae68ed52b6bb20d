"""The report as one HTML page that needs nothing else: no script, no network, light and dark."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from importlib import resources

import yaml

from penjing.evaluation import charts
from penjing.evaluation.report import ModuleRow, Report
from penjing.evaluation.size import readable_bytes, readable_seconds

_NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")


def html_page(report: Report, others: Sequence[tuple[str, Report]] = ()) -> str:
    """The whole page. `others` are (name, report) of further results of the same dense model, for comparison.

    Only reports measured on the same tokens enter the size and quality picture; the page names those left out.
    """
    title = escape(report.summary)
    style = (resources.files("penjing.evaluation") / "page.css").read_text(encoding="utf-8")
    sections = [
        f"<header><p class='eyebrow'>Penjing report</p><h1>{title}</h1>"
        f"<p class='soft'>{escape(_subtitle(report))}</p></header>",
        _tiles(report),
        f"<p class='soft'>{escape(_protocol(report))}</p>",
        _remarks(report),
        _quality_picture(report, others),
        _error_pictures(report),
        _curves(report),
        _tensors(report),
        _provenance(report),
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>Penjing: {title}</title><style>\n{style}</style></head>\n<body><main>\n"
        + "\n".join(section for section in sections if section)
        + "\n</main></body></html>\n"
    )


def _subtitle(report: Report) -> str:
    source = report.source
    blocks = len({row.block for row in report.modules if row.block is not None})
    verified = "loaded back and verified" if report.verification.get("passed") else "not verified"
    made_by = f"Penjing {report.software.penjing}"
    return f"{source.model_type}, {source.parameters:,} parameters, {blocks} blocks; {verified}; {made_by}"


def _tiles(report: Report) -> str:
    source, quality = report.source, report.quality
    ratio = source.bytes / max(report.bytes, 1)
    dense_bits = 8 * source.bytes / source.parameters
    tiles = [
        (readable_bytes(report.bytes), f"on disk, from {readable_bytes(source.bytes)}: {ratio:.2f} times smaller"),
        (f"{report.bits_per_weight:.2f}", f"bits per weight, from {dense_bits:.2f}"),
    ]
    if quality:
        dense = quality.reference_perplexity
        beside = "" if dense is None else f", dense {dense:.2f}"
        tiles.append((_number(quality.perplexity, ".2f"), f"perplexity{beside}"))
        if quality.kl is not None:
            tiles.append((f"{quality.kl:.4f}", f"KL from dense, nats per token (± {quality.kl_error or 0:.4f})"))
        if quality.top1 is not None:
            tiles.append((f"{quality.top1:.1%}", "of tokens: same first choice as dense"))
    body = "".join(
        f"<div class='tile'><b>{escape(value)}</b><span>{escape(what)}</span></div>" for value, what in tiles
    )
    return f"<div class='tiles'>{body}</div>"


def _protocol(report: Report) -> str:
    """How it was measured, and what the run took."""
    text = f"Measured on {report.protocol.sentence()}." if report.protocol else "The result was not measured."
    if report.seconds:
        stages = ", ".join(f"{stage} {readable_seconds(seconds)}" for stage, seconds in report.seconds.items())
        text += f" Made in {readable_seconds(sum(report.seconds.values()))} ({stages})."
    if report.peak_memory is not None:
        text += f" Peak memory {readable_bytes(report.peak_memory)} above the loaded libraries."
    return text


def _remarks(report: Report) -> str:
    """Everything that is not as asked: what was left dense, and every note of a module, equal ones gathered."""
    reasons: dict[str, list[str]] = {}
    for entry in report.skipped:
        reasons.setdefault(entry.reason, []).append(entry.name)
    named = {entry.name for entry in report.skipped}
    for row in report.modules:
        for note in row.notes if row.name not in named else ():
            reasons.setdefault(note, []).append(row.name)
    if not reasons:
        return ""
    lines = (f"<li>{escape(reason)}: {_some(names)}</li>" for reason, names in reasons.items())
    return f"<h2>Worth knowing</h2><ul class='notes'>{''.join(lines)}</ul>"


def _some(names: Sequence[str], shown: int = 4) -> str:
    listed = ", ".join(f"<code>{escape(name)}</code>" for name in names[:shown])
    return listed if len(names) <= shown else f"{listed} and {len(names) - shown} more (see Tensors)"


def _quality_picture(report: Report, others: Sequence[tuple[str, Report]]) -> str:
    points, left_out = [], []
    quality, protocol = report.quality, report.protocol
    if not quality or not protocol or quality.perplexity is None or not math.isfinite(quality.perplexity):
        return ""
    if quality.reference_perplexity is not None:
        points.append(charts.Point("dense", report.source.bytes, quality.reference_perplexity, "dense"))
    for name, other in others:
        alike = other.protocol is not None and other.protocol.token_hash == protocol.token_hash
        perplexity = other.quality.perplexity if other.quality and alike else None
        if perplexity is not None and math.isfinite(perplexity):
            points.append(charts.Point(name, other.bytes, perplexity, "other"))
        else:
            left_out.append(name)
    points.append(charts.Point(" + ".join(report.methods) or "this model", report.bytes, quality.perplexity, "this"))
    caption = "Size against perplexity: lower and further left is better."
    if left_out:
        caption += f" Not measured on the same tokens and left out: {', '.join(left_out)}."
    return f"<h2>Size and quality</h2>{charts.scatter(points, caption=caption)}"


def _error_pictures(report: Report) -> str:
    pictures = []
    in_blocks = [row for row in report.modules if row.block is not None and row.kind == "linear"]
    cells = _cells(in_blocks)
    left = max(charts.label_width(cells), 64)
    if any(row.error is not None for row in in_blocks):
        columns = max(row.block or 0 for row in in_blocks) + 1
        caption = f"Relative error of every linear ({_kinds(in_blocks)}). Hover over a square for its numbers."
        pictures.append(charts.heat_map(cells, columns, left=left, caption=caption))
    if any(report.block_errors):  # a model that was only cut is compared with itself, and nothing changes
        titles = [f"block {index}: {error:.4f}" for index, error in enumerate(report.block_errors)]
        caption = "How much each block's output changes for the same inputs, relative, on a few probe tokens."
        pictures.append(charts.bars(report.block_errors, titles, left=left, caption=caption))
    return f"<h2>Where the error is</h2>{''.join(pictures)}" if pictures else ""


def _cells(rows: Sequence[ModuleRow]) -> dict[str, dict[int, charts.Cell]]:
    """Role -> block -> cell. Experts share a row, which shows the worst of them."""
    cells: dict[str, dict[int, charts.Cell]] = {}
    for row in rows:
        role = _NUMBER.sub("*", f".{row.role}")[1:]
        if row.error is None:
            cell = charts.Cell(None, f"{row.name}: {row.scheme}{''.join(f'; {note}' for note in row.notes)}")
        else:
            cell = charts.Cell(row.error, f"{row.name}: {row.error:.4f}, {row.scheme}, {readable_bytes(row.bytes)}")
        before = cells.setdefault(role, {}).get(row.block or 0)
        if before is None or (cell.value or 0.0) > (before.value or 0.0):
            cells[role][row.block or 0] = cell
    return cells


def _kinds(rows: Sequence[ModuleRow]) -> str:
    words = {"output": "of its output on calibration text", "weight": "of its weight"}
    kinds = sorted({row.error_kind for row in rows if row.error is not None})
    return " or ".join(words.get(kind, kind) for kind in kinds)


def _curves(report: Report) -> str:
    """The loss of every training on the way."""
    pictures = []
    for entry in report.made:
        drawn = entry.get("curve")
        if drawn and drawn["losses"]:
            caption = (
                f"{entry['step']['method']}: loss, {drawn['losses'][0]:.4f} at first, {drawn['losses'][-1]:.4f} at last"
            )
            pictures.append(charts.curve(drawn["steps"], drawn["losses"], caption=caption))
    return f"<h2>Training</h2>{''.join(pictures)}" if pictures else ""


def _tensors(report: Report) -> str:
    columns = ("module", "shape", "steps", "becomes", "predicted", "written", "relative error", "notes")
    numbers, number = ("predicted", "written", "relative error"), " class='number'"
    heads = "".join(f"<th{number if name in numbers else ''}>{name}</th>" for name in columns)
    body = "".join(_tensor(row) for row in report.modules)
    difference = report.bytes - report.predicted_bytes
    total = f"predicted {report.predicted_bytes:,} bytes, written {report.bytes:,} ({difference:+,})"
    return (
        f"<h2>Tensors</h2><p class='soft'>{escape(total)}</p><details><summary>{len(report.modules)} modules</summary>"
        f"<div class='scroll'><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div></details>"
    )


def _tensor(row: ModuleRow) -> str:
    error = "" if row.error is None else f"{row.error:.4f} ({row.error_kind})"
    return (
        f"<tr><td><code>{escape(row.name)}</code></td><td>{' × '.join(map(str, row.shape))}</td>"
        f"<td>{escape(' + '.join(row.steps))}</td><td>{escape(row.scheme)}</td>"
        f"<td class='number'>{row.predicted_bytes:,}</td><td class='number'>{row.bytes:,}</td>"
        f"<td class='number'>{error}</td><td class='text'>{escape('; '.join(row.notes))}</td></tr>"
    )


def _provenance(report: Report) -> str:
    """Recipe, texts, machine: what it takes to do the run again."""
    facts = {"dense model": f"{report.source.label}, {report.source.dtype}, fingerprint {report.source.fingerprint}"}
    text = report.calibration
    if text:
        facts["calibration"] = (
            f"{text.corpus}, {text.windows} windows of {text.length} tokens, "
            f"text sha256 {text.text_hash}, tokens sha256 {text.token_hash}"
        )
    if report.protocol:
        facts["evaluation"] = f"text sha256 {report.protocol.text_hash}, tokens sha256 {report.protocol.token_hash}"
    if report.verification:
        facts["verification"] = ", ".join(f"{key} {value}" for key, value in report.verification.items())
    software = report.software
    facts["software"] = (
        f"penjing {software.penjing}, torch {software.torch}, transformers {software.transformers}, "
        f"Python {software.python}"
    )
    facts["machine"] = f"{software.platform}, {software.cpu}, {software.threads} threads"
    rows = "".join(
        f"<tr><th>{escape(key)}</th><td class='text'><code>{escape(value)}</code></td></tr>"
        for key, value in facts.items()
    )
    recipe = escape(yaml.safe_dump(report.recipe, sort_keys=False, allow_unicode=True))
    sample = f"<details><summary>Calibration text, the beginning</summary><pre>{escape(report.sample)}</pre></details>"
    return (
        f"<h2>How it was made</h2><details open><summary>Recipe</summary><pre>{recipe}</pre></details>"
        "<details open><summary>Text, software, machine</summary><div class='scroll'><table><tbody>"
        f"{rows}</tbody></table></div></details>{sample if report.sample else ''}"
    )


def _number(value: float | None, form: str) -> str:
    return "infinite" if value is None or not math.isfinite(value) else format(value, form)
