"""The page: well-formed, complete, and dependent on nothing outside itself."""

from __future__ import annotations

import dataclasses
import math
import re
from html.parser import HTMLParser

import pytest

from penjing.evaluation import charts
from penjing.evaluation.html import html_page

VOID = {"meta", "rect", "circle", "line"}


class Checker(HTMLParser):
    """Every tag that opens closes, in order; collects text and tags."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.counts: dict[str, int] = {}

    def handle_starttag(self, tag, attrs):
        self.counts[tag] = self.counts.get(tag, 0) + 1
        assert len(dict(attrs)) == len(attrs), f"<{tag}> repeats an attribute"
        self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        assert tag in VOID
        self.counts[tag] = self.counts.get(tag, 0) + 1

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def _check(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def test_page_is_well_formed_and_complete(report):
    checker = _check(html_page(report))
    text = " ".join(checker.text)
    assert checker.counts["svg"] == 3
    for words in (
        "17.90",
        "16.40",
        "86.2%",
        "0.0870",
        report.protocol.sentence(),
        "method: gptq",
        "a processor, 2 cores",
    ):
        assert words in text
    for row in report.modules:
        assert row.name in text
    assert "damping <raised> & more" in text


def test_page_needs_nothing_from_outside(report):
    page = html_page(report)
    assert not re.search(r"https?://|<script|<link|url\(|@import|\bsrc=", page)


def test_heat_map_has_a_square_per_linear_and_marks_the_one_without_error(report):
    page = html_page(report)
    assert page.count("<title>model.layers.") == 6
    assert re.search(r'<rect class="empty"[^>]*><title>model\.layers\.1\.mlp\.down_proj: dense', page)


def test_comparison_names_reports_on_other_text(report):
    alike = dataclasses.replace(report, bytes=9000)
    other = dataclasses.replace(report, protocol=dataclasses.replace(report.protocol, token_hash="00" * 32))
    page = html_page(report, [("rtn", alike), ("elsewhere", other)])
    assert "rtn: 0.0 MB, perplexity 17.900" in page
    assert "left out: elsewhere" in page
    _check(page)


def test_a_model_that_was_only_cut_has_no_picture_of_errors(report):
    rows = tuple(dataclasses.replace(row, error=None) for row in report.modules)
    assert "Where the error is" in html_page(dataclasses.replace(report, modules=rows))
    assert "Where the error is" not in html_page(dataclasses.replace(report, modules=rows, block_errors=(0.0, 0.0)))


def test_unmeasured_and_empty_reports(report):
    bare = dataclasses.replace(
        report, quality=None, protocol=None, calibration=None, modules=(), block_errors=(), seconds={}, verification={}
    )
    checker = _check(html_page(bare))
    assert "svg" not in checker.counts
    assert "The result was not measured." in " ".join(checker.text)
    hopeless = dataclasses.replace(report, quality=dataclasses.replace(report.quality, perplexity=math.inf))
    assert "infinite" in html_page(hopeless)


def test_experts_share_a_row_that_shows_the_worst(report):
    rows = [
        dataclasses.replace(report.modules[1], name=f"model.layers.0.mlp.experts.{expert}.up_proj", error=error)
        for expert, error in enumerate((0.1, 0.4, 0.2))
    ]
    page = html_page(dataclasses.replace(report, modules=tuple(rows)))
    assert ">mlp.experts.*.up_proj<" in page
    assert re.findall(r"<title>(model\.layers\.0\S+):", page) == ["model.layers.0.mlp.experts.1.up_proj"]


@pytest.mark.parametrize(("low", "high"), [(0.0, 0.15), (0.0, 269.0), (16.1, 17.9), (3.0, 3.0001), (0.0, 0.0)])
def test_ticks_cover_the_values(low, high):
    ticks = charts.nice_ticks(low, high, 5)
    assert ticks[0] <= low and ticks[-1] >= high - 1e-9
    assert len(ticks) <= 8


@pytest.mark.parametrize(("low", "high"), [(3.5, 24.0), (16.0, 9.9e4), (5.0, 5.0), (5.0, 1e30)])
def test_log_ticks_cover_the_values(low, high):
    ticks = charts.log_ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high * (1 - 1e-9)


def test_labels_of_equal_points_do_not_overlap():
    points = [charts.Point(f"model {index}", 1e8, 10.0, "other") for index in range(4)]
    picture = charts.scatter(points, caption="")
    heights = [float(found) for found in re.findall(r'y="([\d.]+)"[^>]*class="label', picture)]
    assert len(heights) == 4
    assert min(abs(a - b) for a in heights for b in heights if a is not b) >= 16


def test_a_training_is_drawn(report):
    from dataclasses import replace

    entry = {"step": {"method": "recover"}, "curve": {"steps": [1, 2, 3], "losses": [2.0, 1.0, 0.5]}}
    page = html_page(replace(report, made=(entry, {"step": {"method": "cut"}})))
    assert page.count('class="curve"') == 1 and "recover: loss, 2.0000 at first, 0.5000 at last" in page
    assert "<h2>Training</h2>" not in html_page(report)
