"""Every method Penjing knows. A method is a function; the table of its family says which, and what it needs.

Tables are imported when they are asked for: a recipe waits for the families up to those of its methods, not for all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module

from penjing.methods.base import Method

_FOLDERS = {
    "quantisation": "quantization",
    "binarisation": "binarization",
    "pruning": "pruning",
    "low rank": "low_rank",
    "weight sharing": "weight_sharing",
    "distillation": "distillation",
    "adaptation": "adaptation",
}


class _Families(Mapping[str, tuple[Method, ...]]):
    """Family -> its methods."""

    def __getitem__(self, family: str) -> tuple[Method, ...]:
        table: tuple[Method, ...] = import_module(f"penjing.methods.{_FOLDERS[family]}.table").TABLE
        return table

    def __iter__(self) -> Iterator[str]:
        return iter(_FOLDERS)

    def __len__(self) -> int:
        return len(_FOLDERS)


FAMILIES = _Families()


class _Methods(Mapping[str, Method]):
    """Name -> method, in the order of the families."""

    def __getitem__(self, name: str) -> Method:
        for table in FAMILIES.values():
            for method in table:
                if method.name == name:
                    return method
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return (method.name for table in FAMILIES.values() for method in table)

    def __len__(self) -> int:
        return sum(map(len, FAMILIES.values()))


METHODS = _Methods()
