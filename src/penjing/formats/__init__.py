"""How a representation lies on disk. One file or folder per format, all behind `formats.base.Format`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib import import_module
from typing import Any, get_args

from penjing.errors import FormatError, PenjingError
from penjing.formats.base import Format
from penjing.models.layout import ModuleSpec
from penjing.numerics.float_grids import Element, FloatGrid
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Scheme

_CLASSES: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "dense": ("hf_dense", "DenseFormat", ()),
    "compressed-tensors": ("compressed_tensors", "CompressedTensorsFormat", ()),
    "gptq": ("gptq", "GPTQFormat", (1,)),
    "gptq-v2": ("gptq", "GPTQFormat", (2,)),
    "awq": ("awq", "AWQFormat", ()),
    "bitsandbytes": ("bitsandbytes", "BitsAndBytesFormat", ()),
    "gguf": ("gguf", "GGUFFormat", ()),
    "onnx": ("onnx", "OnnxFormat", ()),
    "native": ("native", "NativeFormat", ()),
}
"""Name -> module, class, and what the class is made with."""


class _Formats(Mapping[str, Format]):
    """Every format Penjing can write, by the name a recipe uses; each is imported when it is asked for."""

    def __getitem__(self, name: str) -> Format:
        return _made(name)

    def __iter__(self) -> Iterator[str]:
        return iter(_CLASSES)

    def __len__(self) -> int:
        return len(_CLASSES)


@lru_cache
def _made(name: str) -> Format:
    module, kind, arguments = _CLASSES[name]
    made: Format = getattr(import_module(f"penjing.formats.{module}"), kind)(*arguments)
    return made


FORMATS = _Formats()

_READ = {
    "compressed-tensors": "compressed-tensors",
    "gptq": "gptq",
    "awq": "awq",
    "bitsandbytes": "bitsandbytes",
    "penjing": "native",
    "penjing-onnx": "onnx",
}
"""`quant_method` in config.json -> format."""

__all__ = ["FORMATS", "Format", "declared_schemes", "format_of"]


def format_of(config: dict[str, Any]) -> Format:
    """The format that a written config.json declares; `dense` when it declares none.

    Raises FormatError for a `quant_method` that Penjing does not read.
    """
    declared = config.get("quantization_config")
    if declared is None:
        return FORMATS["dense"]
    method = declared.get("quant_method") if isinstance(declared, dict) else declared
    if not isinstance(method, str) or method not in _READ:
        raise FormatError(
            f"config.json says quant_method {method!r}; penjing reads {', '.join(_READ)}. "
            "Start from the model that was not quantised"
        )
    second = method == "gptq" and declared.get("checkpoint_format") == "gptq_v2"
    return FORMATS["gptq-v2" if second else _READ[method]]


def declared_schemes(config: Mapping[str, Any], modules: tuple[ModuleSpec, ...]) -> dict[str, Scheme]:
    """Module name -> what a written config.json says of it.

    Raises FormatError when it says something that is no scheme, whatever a damaged or foreign file holds.
    """
    target = format_of(dict(config))
    try:
        found = target.schemes(dict(config), modules)
    except PenjingError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise FormatError(f"`quantization_config` of config.json cannot be read as {target.name}: {error!r}") from error
    for name, scheme in found.items():
        if not _possible(scheme):
            raise FormatError(f"`quantization_config` of config.json makes {name} something that is no grid: {scheme}")
    return found


def _possible(scheme: Scheme) -> bool:
    """Whether numbers that were read are of the kinds that grids have."""
    grid = scheme.grid
    if not isinstance(grid, IntegerGrid | FloatGrid):
        return True
    size = grid.group_size
    grouped = size in (None, "tensor") or (type(size) is int and size > 0)
    if isinstance(grid, FloatGrid):
        return grouped and grid.element in get_args(Element)
    return grouped and type(grid.bits) is int and 1 <= grid.bits <= 8 and isinstance(grid.symmetric, bool)
