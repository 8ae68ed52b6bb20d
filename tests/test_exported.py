"""What `import penjing` offers: exactly the names below, each documented."""

import importlib
import pkgutil

import pytest

import penjing

EXPORTED = [
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


def test_exported_names() -> None:
    assert penjing.__all__ == EXPORTED
    assert set(EXPORTED) <= set(dir(penjing))


@pytest.mark.parametrize("name", EXPORTED)
def test_every_exported_name_exists_and_is_documented(name: str) -> None:
    value = getattr(penjing, name)
    if callable(value):
        assert value.__doc__


@pytest.mark.parametrize("first", ["penjing.api", "penjing.recipe", "penjing.errors"])
def test_a_submodule_never_shadows_a_function(first: str) -> None:
    importlib.import_module(first)
    modules = {module.name for module in pkgutil.iter_modules(penjing.__path__)}
    assert not modules & set(EXPORTED), "`import penjing.NAME` would replace the function `penjing.NAME`"


def test_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        penjing.quantise  # noqa: B018
