"""Teach transformers to load Penjing's native format, without importing it.

When `transformers.quantizers.auto` is imported, by whomever, the native quantizer is registered right after.
This file imports neither torch nor transformers: it runs on every `import penjing`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_TARGET = "transformers.quantizers.auto"


class _AfterImport(MetaPathFinder):
    """Lets the ordinary finders find `_TARGET` once, and registers after it was executed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _TARGET:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register()

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register now if transformers is already there, otherwise as soon as it is."""
    if _TARGET in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())


def _register() -> None:
    from penjing.formats.native.transformers_loader import register

    register()
