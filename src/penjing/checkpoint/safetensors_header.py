"""Reading the header of a safetensors file with nothing but JSON, and believing none of it.

A safetensors file is an 8-byte little-endian length, that many bytes of JSON, and the tensors' bytes:

    {"__metadata__": {str: str}, "<tensor>": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ...}

Offsets count from the end of the header. The tensors fill the rest of the file without gaps or overlaps.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penjing.checkpoint.base import TensorSpec
from penjing.errors import CheckpointError

LARGEST_HEADER = 100_000_000
"""Bytes; the limit of the reference implementation. A larger number means that the file is something else."""

DTYPES: Mapping[str, tuple[str, int]] = {
    "BOOL": ("bool", 1),
    "U8": ("uint8", 1),
    "I8": ("int8", 1),
    "F8_E4M3": ("float8_e4m3fn", 1),
    "F8_E5M2": ("float8_e5m2", 1),
    "F8_E8M0": ("float8_e8m0fnu", 1),
    "I16": ("int16", 2),
    "U16": ("uint16", 2),
    "F16": ("float16", 2),
    "BF16": ("bfloat16", 2),
    "I32": ("int32", 4),
    "U32": ("uint32", 4),
    "F32": ("float32", 4),
    "I64": ("int64", 8),
    "U64": ("uint64", 8),
    "F64": ("float64", 8),
    "C64": ("complex64", 8),
}
"""Name in the file -> torch name and bytes per element."""


@dataclass(frozen=True)
class Header:
    """A checked header: tensors by name, where in the file they begin, free-form metadata, the raw JSON bytes."""

    tensors: dict[str, TensorSpec]
    begins: dict[str, int]
    metadata: dict[str, str]
    raw: bytes


def read_header(path: Path) -> Header:
    """Read and check the header of `path`. Raises CheckpointError that names the file and the broken rule."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8:
                raise CheckpointError(f"{path}: {size} bytes is too short for a safetensors file; download it again")
            if length > min(LARGEST_HEADER, size - 8):
                raise CheckpointError(
                    f"{path}: says its header has {length} bytes but the file has {size}: "
                    "truncated, or not safetensors; download it again"
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    return parse_header(raw, size - 8 - length, path)


def parse_header(raw: bytes, data_size: int, path: Path) -> Header:
    """Check header bytes against the `data_size` bytes that follow them in the file."""
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the safetensors header is not valid JSON: {error}") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: the safetensors header is not a JSON object")
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: `__metadata__` in the safetensors header must map strings to strings")
    checked = {name: _check_entry(entry, data_size, f"{path}: tensor {name!r}") for name, entry in entries.items()}
    _check_coverage({name: span for name, (_, span) in checked.items()}, data_size, path)
    data = 8 + len(raw)
    begins = {name: data + begin for name, (_, (begin, _)) in checked.items()}
    return Header({name: spec for name, (spec, _) in checked.items()}, begins, metadata, raw)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        raise ValueError("a name occurs twice")
    return entries


def _check_entry(entry: object, data_size: int, where: str) -> tuple[TensorSpec, tuple[int, int]]:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: the header entry must hold dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise CheckpointError(f"{where}: dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    if not _naturals(shape):
        raise CheckpointError(f"{where}: shape {shape!r} is not a list of sizes")
    if not _naturals(offsets) or len(offsets) != 2 or not offsets[0] <= offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {offsets!r} are not a begin and an end")
    begin, end = offsets
    if end > data_size:
        raise CheckpointError(
            f"{where}: ends at byte {end} of {data_size} that are there: the file is truncated; download it again"
        )
    name, width = DTYPES[dtype]
    if math.prod(shape) * width != end - begin:
        raise CheckpointError(
            f"{where}: {dtype} of shape {shape} does not take the {end - begin} bytes its offsets span"
        )
    return TensorSpec(tuple(shape), name, end - begin), (begin, end)


def _naturals(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _check_coverage(spans: Mapping[str, tuple[int, int]], data_size: int, path: Path) -> None:
    """Tensors must follow one another and fill the file, as the format demands."""
    position, previous = 0, "the header"
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin < position:
            raise CheckpointError(f"{path}: tensors {previous!r} and {name!r} overlap; the header is corrupt")
        if begin > position:
            raise CheckpointError(f"{path}: {begin - position} bytes before tensor {name!r} belong to no tensor")
        position, previous = end, name
    if position != data_size:
        raise CheckpointError(f"{path}: the last {data_size - position} bytes belong to no tensor; the file is corrupt")
