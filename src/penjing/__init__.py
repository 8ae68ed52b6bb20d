"""Penjing makes large language models small: quantisation and pruning, planned first, measured and verified.

    import penjing

    print(penjing.plan("demo", "w4a16-gptq"))
    report = penjing.compress("demo", "w4a16-gptq", "build/demo")
    penjing.evaluate("build/demo", against="demo")

Names are imported when they are first used, so that `import penjing` costs milliseconds. Importing it also lets
transformers load models in Penjing's native format.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from penjing.transformers_hook import install as _install_loader

if TYPE_CHECKING:
    from penjing.api import (
        allocate,
        bench,
        compare,
        compress,
        distribute,
        evaluate,
        export,
        inspect,
        plan,
        ranks,
        serve,
        verify,
    )
    from penjing.engines import ENGINES
    from penjing.engines.chat import Talk
    from penjing.errors import PenjingError
    from penjing.formats import FORMATS
    from penjing.methods import METHODS
    from penjing.methods.quantization.kivi import KVCache
    from penjing.recipe import Recipe, load_recipe
    from penjing.runtime.kv_cache import QuantizedCache

__version__ = "0.1.0"

__all__ = [
    "ENGINES",
    "FORMATS",
    "METHODS",
    "KVCache",
    "PenjingError",
    "QuantizedCache",
    "Recipe",
    "Talk",
    "allocate",
    "bench",
    "compare",
    "compress",
    "distribute",
    "evaluate",
    "export",
    "inspect",
    "load_recipe",
    "plan",
    "ranks",
    "serve",
    "verify",
]

_HOME = {
    "ENGINES": "penjing.engines",
    "FORMATS": "penjing.formats",
    "KVCache": "penjing.methods.quantization.kivi",
    "METHODS": "penjing.methods",
    "PenjingError": "penjing.errors",
    "QuantizedCache": "penjing.runtime.kv_cache",
    "Recipe": "penjing.recipe",
    "Talk": "penjing.engines.chat",
    "load_recipe": "penjing.recipe",
}

_install_loader()


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'penjing' has no attribute {name!r}")
    value = getattr(import_module(_HOME.get(name, "penjing.api")), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
