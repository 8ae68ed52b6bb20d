"""Imports point only downwards, and the cheap doors of the package stay cheap."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import penjing

PACKAGE = Path(penjing.__file__).parent

# Top may import below, never upward. A name is a module or a subpackage of penjing.
ORDER = [
    "__main__",
    "cli",
    "tables",
    "api",
    "budgets",
    "pipeline",
    "engines",
    "training",
    "teachers",
    "evaluation",
    "planning",
    "mixes",
    "rules",
    "targets",
    "costs",
    "recipe",
    "transformers_hook",
    "formats",
    "runtime",
    "methods",
    "representations",
    "statistics",
    "models",
    "checkpoint",
    "numerics",
    "compiled",
    "memory",
    "progress",
    "errors",
]


def part_of(module: str) -> str:
    """`penjing.methods.pruning.wanda` -> `methods`."""
    return module.split(".")[1] if "." in module else "penjing"


def imports_of(path: Path) -> set[str]:
    """Parts of penjing that a file imports, wherever the import stands in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            if node.module == "penjing":
                found |= {alias.name if alias.name in ORDER else "penjing" for alias in node.names}
            elif node.module and node.module.startswith("penjing."):
                found.add(part_of(node.module))
        elif isinstance(node, ast.Import):
            found |= {part_of(alias.name) for alias in node.names if alias.name.split(".")[0] == "penjing"}
    return found


def files() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")


@pytest.mark.parametrize("path", files(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert here in ORDER, f"{here} has no place in the order of imports"
    for imported in imports_of(path) - {"penjing", here}:
        assert ORDER.index(here) < ORDER.index(imported), f"{here} must not import {imported}"


def test_the_package_itself_imports_only_the_hook() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    imported = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    assert [module for module in imported if module and module.startswith("penjing")] == ["penjing.transformers_hook"]


@pytest.mark.parametrize("command", ["import penjing", "from penjing.cli import main; main(['--help'])"])
def test_help_and_import_leave_torch_and_transformers_alone(command: str) -> None:
    heavy = "[name for name in ('torch', 'transformers', 'numpy') if name in sys.modules]"
    program = f"import sys; {command}; loaded = {heavy}; sys.exit(str(loaded) if loaded else 0)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_nothing_but_the_core_is_needed_to_plan(tmp_path: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
              "num_hidden_layers": 1, "vocab_size": 300}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    extras = "('gguf', 'onnx', 'onnxruntime', 'peft', 'accelerate', 'lm_eval', 'datasets', 'compressed_tensors')"
    recipe = "{'steps': [{'method': 'rtn', 'bits': 4, 'group_size': 32}], 'format': 'native'}"
    without = f"import sys; sys.modules.update(dict.fromkeys({extras}))"
    program = f"{without}; import penjing; penjing.plan({str(tmp_path)!r}, {recipe})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
