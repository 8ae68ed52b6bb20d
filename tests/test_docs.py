"""Documentation that cannot go stale unnoticed: commands parse, links resolve, tables are complete; size budgets."""

import ast
import dataclasses
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from penjing.cli import app
from penjing.evaluation.report import ModuleRow, Report
from penjing.formats import FORMATS
from penjing.methods import METHODS
from penjing.recipe import builtin_recipes, load_recipe

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("src/**/*.md"), *ROOT.glob("benchmarks/**/*.md")]
)
SOURCES = sorted((ROOT / "src").rglob("*.py"))
MAX_FILE, MAX_FUNCTION = 400, 60


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def commands() -> list[tuple[str, str]]:
    """(page, command line) of every line that starts with a prompt in a console block."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```console\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            found += [(relative(page), line[2:]) for line in block.splitlines() if line.startswith("$ ")]
    return found


@pytest.mark.parametrize(("page", "line"), commands())
def test_command_parses(page: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    if words[0] == "penjing":
        verb, at = typer.main.get_command(app), 1
        while hasattr(verb, "commands"):
            verb, at = verb.commands[words[at]], at + 1
        given = verb.make_context(words[at - 1], words[at:]).params
        if given.get("recipe") and not given["recipe"].endswith(".yaml"):
            assert given["recipe"] in builtin_recipes()
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
        assert words[1] in targets
    else:
        assert words[0] in ("pip", "python", "git", "cd"), f"{page}: what is {words[0]}?"


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_resolve(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", text):
        assert "://" not in target or target.startswith("https://"), target
        if "://" not in target:
            assert (page.parent / target.partition("#")[0]).exists(), f"{relative(page)}: {target}"


def test_every_page_is_reachable_from_the_index() -> None:
    index = (ROOT / "docs/index.md").read_text(encoding="utf-8")
    pages = {str(page.relative_to(ROOT / "docs")) for page in ROOT.glob("docs/**/*.md")} - {"index.md"}
    assert pages <= set(re.findall(r"\]\(([^)]+)\)", index))


def test_yaml_in_pages_is_valid() -> None:
    import yaml

    blocks = [
        block
        for page in PAGES
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    ]
    assert blocks
    for block in blocks:
        load_recipe(yaml.safe_load(block))


def test_python_in_pages_compiles() -> None:
    for page in PAGES:
        for block in re.findall(r"```python\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            compile(block, relative(page), "exec")


def test_every_method_has_a_line_among_the_papers() -> None:
    text = (ROOT / "docs/papers.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `([\w-]+)` \| ([^|]+) \|", text, re.MULTILINE))
    assert list(rows) == list(METHODS)
    for name, paper in rows.items():
        numbers = re.findall(r"\d{4}\.\d{5}", METHODS[name].paper)
        assert all(number in paper for number in numbers if name != "rtn"), f"{name}: {paper}"


def test_every_format_is_in_the_guide_to_loading() -> None:
    text = (ROOT / "docs/guides/load-the-result.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `([\w-]+)` \|", text, re.MULTILINE)) == set(FORMATS)


def test_every_key_of_the_report_is_in_its_reference() -> None:
    text = (ROOT / "docs/reference/report.md").read_text(encoding="utf-8")
    documented = {
        name for row in re.findall(r"^\| (`[^|]+) \|", text, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)
    }
    keys = {field.name for kind in (Report, ModuleRow) for field in dataclasses.fields(kind)}
    assert documented == keys | {"bits_per_weight"}


def test_reference_pages_follow_the_code() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/reference.py", "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_tables_follow_the_results() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts/result_tables.py", "--check"], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr


def test_files_in_the_architecture_exist() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    tree = text.split("```")[1].splitlines()
    folder = ROOT / "src/penjing"
    for line in tree[2:]:
        indent, name = re.match(r"( *)(\S+)", line).groups()  # type: ignore[union-attr]
        if len(indent) == 2:
            folder = ROOT / "src/penjing" / name
            assert folder.exists(), name
        else:
            assert (folder / name).exists(), f"{folder.name}/{name}"


@pytest.mark.parametrize("path", SOURCES, ids=relative)
def test_size_budget(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1  # type: ignore[operator]
            assert lines <= MAX_FUNCTION, f"{node.name} has {lines} lines"


def test_nothing_points_at_one_machine() -> None:
    tracked = [*PAGES, *SOURCES, *ROOT.glob("*.toml"), *ROOT.glob("*.txt"), ROOT / "Makefile", ROOT / ".ci/run"]
    for path in tracked:
        assert not re.search(r"/(work|root|home|tmp)/\w", path.read_text(encoding="utf-8")), relative(path)
