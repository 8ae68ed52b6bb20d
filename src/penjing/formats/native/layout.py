"""One compressed matrix as a handful of self-describing tensors, every code at its exact bit width.

    weight_header           uint8: JSON with the shape and the scheme, as config.json has them
    weight_mask             uint8: one bit per weight, 1 where it is kept; absent when all are
    weight_values           the kept weights themselves, when they lie on no grid
    weight_column_index     int32 (m,) and weight_column_values (N, m): whole columns beside the grid
    weight_outlier_starts   int32 (N + 1,), weight_outlier_index int16 (m,), weight_outlier_values (m,): single weights
    ...                     what the codec of the grid writes (see `codecs`)

Names follow the module's name and a dot.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from penjing.errors import FormatError
from penjing.formats.native.codecs import CODECS, codec_for, codec_named
from penjing.formats.native.codecs.base import Parts, stream, stream_bytes
from penjing.representations import (
    Activations,
    BinaryCoded,
    Columns,
    Dense,
    Masked,
    Outliers,
    Patched,
    Quantized,
    Representation,
    Scheme,
)
from penjing.representations.patched import index_dtype

_COLUMNS = ("column_index", "column_values")
_OUTLIERS = ("outlier_starts", "outlier_index", "outlier_values")


def part_names(scheme: Scheme) -> list[str]:
    """Names of the tensors that stand for a weight of `scheme`, after `weight_`."""
    names = ["header"]
    if scheme.sparsity:
        names.append("mask")
    names += codec_for(scheme.grid).parts(scheme.grid) if scheme.grid else ["values"]
    names += ["group_index"] if scheme.ordered else []
    names += _COLUMNS if scheme.columns else []
    return names + (list(_OUTLIERS) if scheme.outliers else [])


def to_parts(weight: Representation, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors that stand for `weight`, by part."""
    parts = {"header": _header(tuple(weight.shape), scheme)}
    if isinstance(weight, Patched):
        patch = weight.patch
        if isinstance(patch, Columns):
            parts |= {"column_index": patch.index.int(), "column_values": patch.values.contiguous()}
        else:
            starts, index = patch.starts.int(), patch.index
            parts |= {"outlier_starts": starts, "outlier_index": index, "outlier_values": patch.values.contiguous()}
        weight = weight.base
    kept = weight.kept if isinstance(weight, Masked) else None
    if kept is not None:
        parts["mask"] = stream(kept.to(torch.uint8), 1)
    coded = weight.values if isinstance(weight, Masked) else weight
    if isinstance(coded, Dense):
        return parts | {"values": coded.values[kept].contiguous()}
    return parts | codec_for(coded.grid).write(coded, kept)


def from_parts(tensors: Mapping[str, Tensor], name: str) -> tuple[Representation, Scheme]:
    """The inverse of `to_parts`; raises FormatError naming the module `name` and the part that is wrong."""
    shape, scheme = _read_header(tensors, name)
    if extra := sorted(tensors.keys() - set(part_names(scheme))):
        listed = ", ".join(f"weight_{part}" for part in extra)
        raise FormatError(f"{name}: {listed} unexpected; the checkpoint is damaged")
    parts, (rows, columns) = Parts(tensors, name), shape
    kept = parts.codes("mask", 1, rows * columns).reshape(shape).bool() if scheme.sparsity else None
    if scheme.grid is None:
        if kept is None:
            raise FormatError(f"{name}: weight_mask missing; the checkpoint is damaged")
        values = torch.zeros(shape, dtype=_stored(tensors, "values", name).dtype)
        values[kept] = parts.take("values", int(kept.sum()))
        return Masked(Dense(values), kept), scheme
    coded = codec_for(scheme.grid).read(parts, shape, scheme.grid, kept)
    if isinstance(coded, Quantized | BinaryCoded) and kept is not None:
        return Masked(coded, kept), scheme
    if scheme.columns:
        index = parts.take("column_index", scheme.columns)
        return Patched(coded, Columns(index, parts.take("column_values", rows, scheme.columns))), scheme
    if scheme.outliers:
        starts = parts.take("outlier_starts", rows + 1)
        count = int(starts[-1])
        patch = Outliers(starts, parts.take("outlier_index", count), parts.take("outlier_values", count))
        return Patched(coded, patch), scheme
    return coded, scheme


def parts_bytes(shape: tuple[int, ...], scheme: Scheme, kept: int, itemsize: int) -> int:
    """Bytes of what `to_parts` makes of a matrix of `shape` with `kept` surviving weights.

    itemsize  bytes of a value that is not on a grid
    """
    rows, columns = shape
    total = _header(shape, scheme).numel()
    total += stream_bytes(rows * columns, 1) if scheme.sparsity else 0
    total += codec_for(scheme.grid).nbytes(shape, scheme.grid, kept) if scheme.grid else kept * itemsize
    total += 4 * columns if scheme.ordered else 0
    total += scheme.columns * (4 + rows * itemsize)
    outliers = round(scheme.outliers * rows * columns)
    return total + (4 * (rows + 1) + outliers * (index_dtype(columns).itemsize + itemsize) if scheme.outliers else 0)


def decoded(tensors: Mapping[str, Tensor], name: str, dtype: torch.dtype) -> Tensor:
    """The matrix (N, K) in `dtype`: products in fp32, rounded once."""
    return decode(from_parts(tensors, name)[0], dtype)


def decode(weight: Representation, dtype: torch.dtype) -> Tensor:
    """The one way Penjing turns codes into values, in memory and when a file is loaded."""
    return weight.dense().to(dtype)


def scheme_entry(scheme: Scheme) -> dict[str, Any]:
    """What config.json says about `scheme`."""
    entry: dict[str, Any] = {}
    if scheme.grid is not None:
        codec = codec_for(scheme.grid)
        entry |= {"grid": codec.name, **codec.entry(scheme.grid)}
    if scheme.pattern:
        entry["pattern"] = list(scheme.pattern)
    if scheme.activations is not None:
        usual = asdict(Activations(scheme.activations.bits))
        told = asdict(scheme.activations)
        entry["activations"] = {key: value for key, value in told.items() if key == "bits" or value != usual[key]}
    for key in ("sparsity", "ordered", "columns", "outliers"):
        if value := getattr(scheme, key):
            entry[key] = value
    return entry


def read_scheme(entry: Mapping[str, Any]) -> Scheme:
    """The inverse of `scheme_entry`."""
    return Scheme(
        grid=codec_named(entry["grid"]).read_grid(entry) if "grid" in entry else None,
        sparsity=entry.get("sparsity", 0.0),
        pattern=tuple(entry["pattern"]) if "pattern" in entry else None,
        activations=Activations(**entry["activations"]) if "activations" in entry else None,
        ordered=entry.get("ordered", False),
        columns=entry.get("columns", 0),
        outliers=entry.get("outliers", 0.0),
    )


_OWN = {"header", "mask", "values", "group_index", *_COLUMNS, *_OUTLIERS}
ALL_PARTS = sorted(_OWN.union(*(codec.all_parts for codec in CODECS.values())))
"""Every part that some scheme has."""


def _header(shape: tuple[int, ...], scheme: Scheme) -> Tensor:
    text = json.dumps({"shape": list(shape), **scheme_entry(scheme)}, sort_keys=True)
    return torch.frombuffer(bytearray(text, "ascii"), dtype=torch.uint8)


def _read_header(tensors: Mapping[str, Tensor], name: str) -> tuple[tuple[int, int], Scheme]:
    try:
        entry = json.loads(bytes(_stored(tensors, "header", name).tolist()))
        rows, columns = entry["shape"]
        return (rows, columns), read_scheme(entry)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(f"{name}.weight_header cannot be read ({error}); the checkpoint is damaged") from error


def _stored(tensors: Mapping[str, Tensor], part: str, name: str) -> Tensor:
    if part not in tensors:
        raise FormatError(f"{name}: weight_{part} is missing; the checkpoint is incomplete")
    return tensors[part]
