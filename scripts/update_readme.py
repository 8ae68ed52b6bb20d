"""Fill the result table of README.md from the report that `make demo` wrote.

python scripts/update_readme.py build/demo/report.json
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from penjing.evaluation.report import Report, read_report
from penjing.evaluation.size import readable_bytes

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- table:demo -->", "<!-- /table:demo -->"


def table(report: Report) -> str:
    """The dense model beside the result, and how both were measured."""
    if report.quality is None or report.protocol is None:
        raise SystemExit("the report holds no measurement; run `make demo`")
    source, quality = report.source, report.quality
    dense = (
        f"{source.label} ({source.dtype})",
        readable_bytes(source.bytes),
        f"{8 * source.bytes / source.parameters:.2f}",
        f"{quality.reference_perplexity:.2f}",
        "",
        "",
    )
    result = (
        " + ".join(report.methods),
        readable_bytes(report.bytes),
        f"{report.bits_per_weight:.2f}",
        f"{quality.perplexity:.2f}",
        f"{quality.kl:.4f} ± {quality.kl_error:.4f}",
        f"{quality.top1:.1%}",
    )
    lines = [
        "| model | weights on disk | bits per weight | perplexity | KL, nats per token | same top token |",
        "| --- | --- | --- | --- | --- | --- |",
        *("| " + " | ".join(row) + " |" for row in (dense, result)),
        "",
        f"{report.protocol.sentence()}. {sum(report.seconds.values()):.0f} s in all on {report.software.cpu}.",
    ]
    return "\n".join(lines)


def main(path: str) -> None:
    """Replace what stands between the two comments of README.md."""
    text = README.read_text(encoding="utf-8")
    body = f"{BEGIN}\n{table(read_report(path))}\n{END}"
    filled, count = re.subn(f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: body, text, flags=re.DOTALL)
    if count != 1:
        raise SystemExit(f"README.md must hold {BEGIN} ... {END} once, found {count}")
    README.write_text(filled, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1])
