"""One compressed matrix as a handful of self-describing tensors, every code at its exact bit width.

    weight_header           uint8: JSON with the shape and the scheme, as config.json has them
    weight_mask             uint8: one bit per weight, 1 where it is kept; absent when all are
    weight_values           the kept weights themselves, when they lie on no grid
    weight_column_index     int32 (m,) and weight_column_values (N, m): whole columns beside the grid
    weight_outlier_starts   int32 (N + 1,), weight_outlier_index int16 (m,), weight_outlier_values (m,): single weights
    ...                     what the codec of the grid writes (see `codecs`)
    weight_left_..., weight_right_...   the factors of a product (N, r) (r, K), each like a matrix of its own
    weight_correction_...               a product that is added
    weight_cores            (N, P): the cores of each row's tensor train, one after the other; or (P,): of the matrix

Names follow the module's name and a dot.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from penjing.errors import FormatError
from penjing.formats.native.codecs import CODECS, codec_for, codec_named
from penjing.formats.native.codecs.base import Parts, stream, stream_bytes
from penjing.formats.native.codecs.codebook import huffman_bytes, huffman_names, huffman_parts, read_huffman
from penjing.numerics.codebooks import CodebookGrid
from penjing.numerics.grids import Grid
from penjing.numerics.huffman import expected_bits
from penjing.numerics.packing import unpack_bits
from penjing.numerics.tensor_trains import Train
from penjing.numerics.train_matrices import TrainMatrix
from penjing.representations import (
    Activations,
    BinaryCoded,
    Codebook,
    Columns,
    Corrected,
    Dense,
    LowRank,
    Masked,
    Outliers,
    Patched,
    Quantized,
    Representation,
    Scheme,
    TensorTrain,
    TensorTrainMatrix,
)
from penjing.representations.patched import index_dtype

_SIDES = ("left", "right")
_COLUMNS = ("column_index", "column_values")
_OUTLIERS = ("outlier_starts", "outlier_index", "outlier_values")


def part_names(scheme: Scheme) -> list[str]:
    """Names of the tensors that stand for a weight of `scheme`, after `weight_`."""
    return ["header", *_names(scheme)]


def _names(scheme: Scheme) -> list[str]:
    if scheme.train is not None:
        return ["cores"]
    if scheme.rank:
        return [f"{side}_{part}" for side in _SIDES for part in _names(scheme.factor)]
    if scheme.correction:
        return [*_names(scheme.base), *(f"correction_{part}" for part in _names(scheme.added))]
    names = list(_mask_names(scheme)) if scheme.sparsity else []
    names += codec_for(scheme.grid).parts(scheme.grid) if scheme.grid else ["values"]
    names += ["group_index"] if scheme.ordered else []
    names += _COLUMNS if scheme.columns else []
    return names + (list(_OUTLIERS) if scheme.outliers else [])


def to_parts(weight: Representation, scheme: Scheme) -> dict[str, Tensor]:
    """The tensors that stand for `weight`, by part."""
    return {"header": _header(tuple(weight.shape), scheme), **_write(weight)}


def _write(weight: Representation) -> dict[str, Tensor]:
    if isinstance(weight, LowRank):
        return _under("left", _write(weight.left)) | _under("right", _write(weight.right))
    if isinstance(weight, TensorTrain | TensorTrainMatrix):
        return {"cores": weight.cores.contiguous()}
    if isinstance(weight, Corrected):
        return _write(weight.base) | _under("correction", _write(weight.correction))
    parts: dict[str, Tensor] = {}
    if isinstance(weight, Patched):
        patch = weight.patch
        if isinstance(patch, Columns):
            parts |= {"column_index": patch.index.int(), "column_values": patch.values.contiguous()}
        else:
            starts, index = patch.starts.int(), patch.index
            parts |= {"outlier_starts": starts, "outlier_index": index, "outlier_values": patch.values.contiguous()}
        weight = weight.base
    kept = weight.kept if isinstance(weight, Masked) else None
    coded = weight.values if isinstance(weight, Masked) else weight
    if kept is not None:
        mask = stream(kept.to(torch.uint8), 1)
        huffman = isinstance(coded, Codebook) and coded.grid.huffman
        parts |= huffman_parts("mask", mask) if huffman else {"mask": mask}
    if isinstance(coded, Dense):
        return parts | {"values": (coded.values if kept is None else coded.values[kept]).contiguous()}
    return parts | codec_for(coded.grid).write(coded, kept)


def from_parts(tensors: Mapping[str, Tensor], name: str) -> tuple[Representation, Scheme]:
    """The inverse of `to_parts`; raises FormatError naming the module `name` and the part that is wrong."""
    shape, scheme = _read_header(tensors, name)
    if extra := sorted(tensors.keys() - set(part_names(scheme))):
        listed = ", ".join(f"weight_{part}" for part in extra)
        raise FormatError(f"{name}: {listed} unexpected; the checkpoint is damaged")
    return _read(Parts(tensors, name), shape, scheme), scheme


def _read(parts: Parts, shape: tuple[int, int], scheme: Scheme) -> Any:
    rows, columns = shape
    if isinstance(scheme.train, TrainMatrix):
        return TensorTrainMatrix(parts.take("cores", sum(scheme.train.sizes)), scheme.train, rows)
    if scheme.train is not None:
        return TensorTrain(parts.take("cores", rows, sum(scheme.train.sizes)), scheme.train)
    if scheme.rank:
        left = _read(parts.under("left"), (rows, scheme.rank), scheme.factor)
        return LowRank(left, _read(parts.under("right"), (scheme.rank, columns), scheme.factor))
    if scheme.correction:
        return Corrected(_read(parts, shape, scheme.base), _read(parts.under("correction"), shape, scheme.added))
    kept = _read_mask(parts, shape, scheme) if scheme.sparsity else None
    if scheme.grid is None:
        if kept is None:
            return Dense(parts.take("values", rows, columns))
        survivors = parts.take("values", int(kept.sum()))
        values = torch.zeros(shape, dtype=survivors.dtype)
        values[kept] = survivors
        return Masked(Dense(values), kept)
    coded = codec_for(scheme.grid).read(parts, shape, scheme.grid, kept)
    if isinstance(coded, Quantized | BinaryCoded | Codebook) and kept is not None:
        return Masked(coded, kept)
    if scheme.columns:
        index = parts.take("column_index", scheme.columns)
        return Patched(coded, Columns(index, parts.take("column_values", rows, scheme.columns)))
    if scheme.outliers:
        starts = parts.take("outlier_starts", rows + 1)
        count = int(starts[-1])
        patch = Outliers(starts, parts.take("outlier_index", count), parts.take("outlier_values", count))
        return Patched(coded, patch)
    return coded


def _mask_names(scheme: Scheme) -> tuple[str, ...]:
    return huffman_names("mask") if _huffman(scheme) else ("mask",)


def _huffman(scheme: Scheme) -> bool:
    return isinstance(scheme.grid, CodebookGrid) and scheme.grid.huffman


def _read_mask(parts: Parts, shape: tuple[int, int], scheme: Scheme) -> Tensor:
    count = math.prod(shape)
    if not _huffman(scheme):
        return parts.codes("mask", 1, count).reshape(shape).bool()
    packed = read_huffman(parts, "mask", stream_bytes(count, 1))
    return unpack_bits(packed.reshape(1, -1), 1, count).reshape(shape).bool()


@lru_cache(maxsize=256)
def _mask_bits(kept: float) -> float:
    """Bits that a byte of a mask is coded in, when this fraction of all weights is kept, anywhere."""
    ones = torch.tensor([byte.bit_count() for byte in range(256)], dtype=torch.float64)
    return expected_bits(kept**ones * (1 - kept) ** (8 - ones))


def parts_bytes(shape: tuple[int, ...], scheme: Scheme, kept: int, itemsize: int) -> int:
    """Bytes of what `to_parts` makes of a matrix of `shape` with `kept` surviving weights.

    itemsize  bytes of a value that is not on a grid
    """
    return _header(shape, scheme).numel() + _bytes(shape, scheme, kept, itemsize)


def _bytes(shape: tuple[int, ...], scheme: Scheme, kept: int, itemsize: int) -> int:
    rows, columns = shape
    if scheme.train is not None:
        trains = 1 if isinstance(scheme.train, TrainMatrix) else rows
        return trains * sum(scheme.train.sizes) * itemsize
    if scheme.rank:
        factors = ((rows, scheme.rank), (scheme.rank, columns))
        return sum(_bytes(factor, scheme.factor, math.prod(factor), itemsize) for factor in factors)
    if scheme.correction:
        return _bytes(shape, scheme.base, kept, itemsize) + _bytes(shape, scheme.added, kept, itemsize)
    total = 0
    if scheme.sparsity:
        mask = stream_bytes(rows * columns, 1)
        total = huffman_bytes(mask, _mask_bits(kept / (rows * columns))) if _huffman(scheme) else mask
    total += codec_for(scheme.grid).nbytes(shape, scheme.grid, kept) if scheme.grid else kept * itemsize
    total += 4 * columns if scheme.ordered else 0
    total += scheme.columns * (4 + rows * itemsize)
    outliers = round(scheme.outliers * rows * columns)
    return total + (4 * (rows + 1) + outliers * (index_dtype(columns).itemsize + itemsize) if scheme.outliers else 0)


def _under(prefix: str, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}_{part}": tensor for part, tensor in parts.items()}


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
        entry |= _grid_entry(scheme.grid)
    if scheme.pattern:
        entry["pattern"] = list(scheme.pattern)
    if scheme.activations is not None:
        usual = asdict(Activations(scheme.activations.bits))
        told = asdict(scheme.activations)
        entry["activations"] = {key: value for key, value in told.items() if key == "bits" or value != usual[key]}
    for key in ("sparsity", "ordered", "columns", "outliers", "rank", "correction"):
        if value := getattr(scheme, key):
            entry[key] = value
    if scheme.correction_grid is not None:
        entry["correction_grid"] = _grid_entry(scheme.correction_grid)
    if scheme.train is not None:
        entry["train"] = {key: list(numbers) for key, numbers in asdict(scheme.train).items()}
    return entry


def _grid_entry(grid: Grid) -> dict[str, Any]:
    codec = codec_for(grid)
    return {"grid": codec.name, **codec.entry(grid)}


def _read_grid(entry: Mapping[str, Any]) -> Grid:
    return codec_named(entry["grid"]).read_grid(entry)


def is_packed(scheme: Scheme) -> bool:
    """Whether a weight of `scheme` lies in parts; otherwise it is a plain tensor."""
    return scheme.grid is not None or scheme.sparsity > 0 or scheme.rank > 0 or scheme.train is not None


def read_scheme(entry: Mapping[str, Any]) -> Scheme:
    """The inverse of `scheme_entry`."""
    return Scheme(
        grid=_read_grid(entry) if "grid" in entry else None,
        sparsity=entry.get("sparsity", 0.0),
        pattern=tuple(entry["pattern"]) if "pattern" in entry else None,
        activations=Activations(**entry["activations"]) if "activations" in entry else None,
        ordered=entry.get("ordered", False),
        columns=entry.get("columns", 0),
        outliers=entry.get("outliers", 0.0),
        rank=entry.get("rank", 0),
        correction=entry.get("correction", 0),
        correction_grid=_read_grid(entry["correction_grid"]) if "correction_grid" in entry else None,
        train=_read_train(entry["train"]) if "train" in entry else None,
    )


def _read_train(entry: Mapping[str, Any]) -> Train | TrainMatrix:
    kind = Train if "modes" in entry else TrainMatrix
    return kind(**{key: tuple(numbers) for key, numbers in entry.items()})


_MATRIX = {"mask", "values", "group_index", *_COLUMNS, *_OUTLIERS}.union(
    *(codec.all_parts for codec in CODECS.values())
)
_FACTORS = {f"{side}_{part}" for side in _SIDES for part in _MATRIX}
ALL_PARTS = sorted({"header", "cores", *_MATRIX, *_FACTORS, *(f"correction_{part}" for part in _FACTORS)})
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
