"""Write docs/reference/recipe.md and docs/reference/cli.md from the code they describe.

python scripts/reference.py           write the pages
python scripts/reference.py --check   fail when a page differs from what would be written
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from penjing.cli import app
from penjing.methods import FAMILIES
from penjing.methods.base import ActivationOptions
from penjing.methods.quantization.kivi import KVCache
from penjing.recipe import Allocate, Calibration, Evaluation, Recipe, Requirements, Step

PAGES = Path(__file__).parents[1] / "docs" / "reference"
NOTE = "<!-- Written by scripts/reference.py; change the code it reads, then run it. -->"


def recipe_page() -> str:
    """Every key of a recipe: its type, its default, what it means."""
    steps = [
        "## Steps",
        "",
        "`method` names a row below. Methods that work on weights take these keys as well:",
        "",
        *_table(Step, {"targets", "ignore", "activations"}),
        "",
        "`targets` and `ignore` hold groups (`linear`, `embedding`, `lm_head`), ends of module names (`down_proj`) and "
        "globs over whole names (`model.layers.0.*`). A pattern that matches nothing is an error.",
        "",
        'An N:M `pattern` needs quotes, `"2:4"`: YAML reads a bare 2:4 as a number in base 60.',
        "",
        "`activations` are quantised at run time, symmetric, one scale per token:",
        "",
        *_table(ActivationOptions),
    ]
    methods: list[str] = []
    for family, table in FAMILIES.items():
        methods += ["", f"## {family.capitalize()}"]
        for method in table:
            methods += ["", f"### {method.name}", "", f"{method.summary} ({method.paper})", "", *_table(method.options)]
    sections: list[str] = []
    parts = {
        "calibration": Calibration,
        "allocate": Allocate,
        "evaluation": Evaluation,
        "require": Requirements,
        "kv_cache": KVCache,
    }
    for name, section in parts.items():
        sections += ["", f"## {name}", "", (section.__doc__ or "").strip(), "", *_table(section)]
    top = set(Recipe.model_fields) - {"steps", *parts}
    return _page("Recipe keys", ["## Top level", "", *_table(Recipe, top), "", *steps, *methods, *sections])


def cli_page() -> str:
    """Every verb with its arguments and options."""
    lines = ["Every verb takes `--json`: the result alone on standard output, all else on standard error."]
    for name, verb in _verbs(typer.main.get_command(app)):
        lines += [
            "",
            f"## penjing {name}",
            "",
            verb.help,
            "",
            "| argument | default | meaning |",
            "| --- | --- | --- |",
        ]
        for given in verb.params:
            if given.name == "help":
                continue
            spelled = ", ".join(f"`{word}`" for word in given.opts)
            if given.param_type_name == "argument":
                spelled = f"`{given.metavar or (given.name or '').upper()}`"
            spelled += "".join(f", `{word}`" for word in given.secondary_opts)
            default = "required" if given.required else "" if given.default in (None, False) else f"`{given.default}`"
            default = default.replace("`True`", "yes")
            lines.append(f"| {spelled} | {default} | {given.help or ''} |")
    codes = [
        "",
        "## Exit codes",
        "",
        "| code | meaning |",
        "| --- | --- |",
        "| 0 | done |",
        "| 1 | a bug in Penjing; `--debug` shows the traceback |",
        "| 2 | bad input: recipe, model, text, output directory, missing package |",
        "| 3 | the written model, loaded back, is not the model that was in memory |",
        "| 4 | the result is worse than the recipe's `require` section allows |",
        "| 130 | interrupted; the same `compress` command resumes |",
    ]
    return _page("Command line", [*lines, *codes])


def _verbs(group: Any, before: str = "") -> Iterator[tuple[str, Any]]:
    """(words, verb) of every verb, those of a group with its name before them."""
    for name, verb in group.commands.items():
        if hasattr(verb, "commands"):
            yield from _verbs(verb, f"{before}{name} ")
        else:
            yield f"{before}{name}", verb


def _page(title: str, lines: list[str]) -> str:
    return "\n".join([f"# {title}", "", NOTE, "", *lines, ""])


def _table(model: type[BaseModel], names: set[str] | None = None) -> Iterator[str]:
    yield "| key | type | default | meaning |"
    yield "| --- | --- | --- | --- |"
    for key, field in model.model_fields.items():
        if names is None or key in names:
            cells = (f"`{key}`", _kind(field), _default(field), field.description or "")
            yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _kind(field: FieldInfo) -> str:
    """The type in a recipe writer's words, read from the JSON schema of the key."""
    holder: Any = type("Holder", (BaseModel,), {"__annotations__": {"key": field.annotation}})
    schema = holder.model_json_schema()["properties"]["key"]
    words = [_schema_word(part) for part in schema.get("anyOf", [schema])]
    limits = {"Ge": ">=", "Gt": ">", "Le": "<=", "Lt": "<"}
    for limit in field.metadata:
        sign = limits.get(type(limit).__name__)
        if sign:
            words[0] += f", {sign} {getattr(limit, type(limit).__name__.lower())}"
    return " or ".join(words)


def _schema_word(schema: dict[str, Any]) -> str:
    if "$ref" in schema:
        return "mapping"
    if "const" in schema:
        return f"`{schema['const']}`".replace("`True`", "`true`")
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    return {"array": "list", "null": "none", "boolean": "true or false"}.get(schema["type"], schema["type"])


def _default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined:
        return "required"
    if field.default in ("", ()):
        return "empty"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    return f"`{str(value).lower() if value is None or isinstance(value, bool) else value}`"


def main() -> int:
    """Write or check both pages."""
    stale = []
    for name, text in (("recipe.md", recipe_page()), ("cli.md", cli_page())):
        path = PAGES / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        stale.append(name)
        if "--check" not in sys.argv:
            path.write_text(text, encoding="utf-8")
    if "--check" in sys.argv and stale:
        print(f"out of date: {', '.join(stale)}; run python scripts/reference.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
