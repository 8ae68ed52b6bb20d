"""What config.json says of a scheme, in the library's own schema, and how it is read back."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from penjing.errors import FormatError, MissingDependency
from penjing.formats.compressed_tensors.floats import CodedFloats, Fp8
from penjing.formats.compressed_tensors.integer import Int8, PackedIntegers
from penjing.formats.compressed_tensors.layouts import Layout
from penjing.numerics.float_grids import FloatGrid, ScaledGrid
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Activations, Scheme

LAYOUTS: dict[str, Layout] = {
    layout.name: layout
    for layout in (
        PackedIntegers(),
        Int8(),
        Fp8(),
        CodedFloats("mxfp8-quantized", packed=False),
        CodedFloats("mxfp4-pack-quantized", packed=True),
        CodedFloats("nvfp4-pack-quantized", packed=True),
    )
}

_FLOATS = {
    ("e4m3", "plain"): "float-quantized",
    ("e4m3", "e8m0"): "mxfp8-quantized",
    ("e2m1", "e8m0"): "mxfp4-pack-quantized",
    ("e2m1", "e4m3"): "nvfp4-pack-quantized",
}
"""Elements and scales of the float grids that have a layout."""
_GROUPS = {"mxfp8-quantized": 32, "mxfp4-pack-quantized": 32, "nvfp4-pack-quantized": 16}
"""The group size a layout is made for."""


class Declared(NamedTuple):
    """What a file tells of a quantised weight; how its scale was chosen and which weights were removed, it does not."""

    grid: ScaledGrid
    activations: Activations | None

    @property
    def layout(self) -> Layout:
        """Of integers, int8 only where an engine multiplies them; everything else is packed to its bit width."""
        grid, inputs = self.grid, self.activations
        if isinstance(grid, FloatGrid):
            return LAYOUTS[_FLOATS[grid.element, grid.scale]]
        integers = grid.bits == 8 and inputs is not None and inputs.kind == "int"
        return LAYOUTS["int-quantized" if integers else "pack-quantized"]


def declared(scheme: Scheme) -> Declared | None:
    """What the file will tell of a scheme; None when the weight stays dense."""
    grid = scheme.grid
    if isinstance(grid, IntegerGrid):
        told: ScaledGrid = IntegerGrid(grid.bits, grid.group_size, grid.symmetric, scale_dtype=grid.scale_dtype)
    elif isinstance(grid, FloatGrid):
        told = FloatGrid(grid.element, grid.group_size, grid.scale, grid.scale_dtype, tile_rows=grid.tile_rows)
    else:
        return None
    return Declared(told, scheme.activations)


def has_layout(grid: FloatGrid) -> bool:
    """Whether compressed-tensors has a place for codes on `grid`."""
    layout = _FLOATS.get((grid.element, grid.scale))
    if layout is None:
        return False
    if layout in _GROUPS:
        return grid.group_size == _GROUPS[layout]
    return not isinstance(grid.group_size, int) or grid.tile_rows == grid.group_size


@functools.cache
def require_library() -> None:
    """Raise MissingDependency without the package."""
    if importlib.util.find_spec("compressed_tensors") is None:
        raise MissingDependency("format compressed-tensors needs a package: pip install compressed-tensors")


def entry(told: Declared, targets: list[str]) -> dict[str, Any]:
    """One of the `config_groups`."""
    group: dict[str, Any] = {"targets": targets, "weights": _weights(told), "format": told.layout.name}
    if told.activations is not None:
        group["input_activations"] = _inputs(told.activations)
    return group


def _weights(told: Declared) -> dict[str, Any]:
    grid = told.grid
    size = grid.group_size
    strategy: str = "group" if isinstance(size, int) else size or "channel"
    weights: dict[str, Any] = {
        "num_bits": grid.bits,
        "type": "int" if isinstance(grid, IntegerGrid) else "float",
        "symmetric": grid.symmetric,
    }
    if isinstance(grid, FloatGrid):
        if grid.tile_rows > 1:
            return weights | {"strategy": "block", "block_structure": [grid.tile_rows, size]}
        if grid.scale == "e8m0":
            weights["scale_dtype"] = "torch.uint8"
        if grid.scale == "e4m3":
            strategy, weights["scale_dtype"] = "tensor_group", "torch.float8_e4m3fn"
    return weights | {"strategy": strategy, "group_size": size if isinstance(size, int) else None}


def _inputs(how: Activations) -> dict[str, Any]:
    return {
        "num_bits": how.bits,
        "type": how.kind,
        "symmetric": how.symmetric,
        "strategy": how.granularity,
        "dynamic": how.dynamic,
    }


def validated(config_groups: dict[str, Any], ignored: list[str]) -> dict[str, Any]:
    """The whole `quantization_config`, as the library itself writes it."""
    require_library()
    from compressed_tensors.quantization import QuantizationConfig

    layouts = {group["format"] for group in config_groups.values()}
    config = QuantizationConfig(
        config_groups=config_groups,
        format=layouts.pop() if len(layouts) == 1 else "mixed-precision",
        quantization_status="compressed",
        ignore=ignored,
    )
    return config.model_dump(mode="json")


def read_entry(name: str, group: Mapping[str, Any], config: Mapping[str, Any], dtype: torch.dtype) -> Scheme:
    """The scheme of one of the `config_groups`; plain scales have the `dtype` of the model."""
    weights: Mapping[str, Any] = group.get("weights") or {}
    inputs = group.get("input_activations")
    grid = _read_grid(weights, dtype) if weights else None
    if grid is None:
        raise FormatError(
            f"quantization_config {name}: these weights cannot be read; penjing reads integers per group, channel or "
            "tensor, FP8 per channel, tensor or 128x128 block, MXFP8, MXFP4 and NVFP4"
        )
    activations = None
    if inputs:
        if inputs["strategy"] not in ("token", "tensor") or inputs["dynamic"] not in (True, False):
            raise FormatError(f"quantization_config {name}: inputs can be read only per token or tensor")
        kind, symmetric = inputs.get("type", "int"), inputs.get("symmetric", True)
        activations = Activations(inputs["num_bits"], kind, inputs["dynamic"], inputs["strategy"], symmetric)
    layout = group.get("format") or config.get("format")
    if layout != Declared(grid, activations).layout.name:
        raise FormatError(f"quantization_config {name}: layout {layout} with {weights['num_bits']} bits cannot be read")
    return Scheme(grid=grid, activations=activations)


def _read_grid(weights: Mapping[str, Any], dtype: torch.dtype) -> ScaledGrid | None:
    bits, strategy, size = weights["num_bits"], weights["strategy"], weights.get("group_size")
    symmetric = weights.get("symmetric", True)
    whole: Mapping[str, Any] = {"channel": None, "tensor": "tensor"}
    if weights["type"] == "int" and strategy in ("group", *whole):
        return IntegerGrid(bits, whole.get(strategy, size), symmetric, scale_dtype=dtype)
    if weights["type"] != "float" or not symmetric:
        return None
    if strategy in whole and bits == 8:
        return FloatGrid("e4m3", whole[strategy], scale_dtype=dtype)
    if strategy == "block" and bits == 8:
        rows, columns = weights["block_structure"]
        return FloatGrid("e4m3", columns, scale_dtype=dtype, tile_rows=rows) if rows == columns else None
    if strategy == "group" and size == 32 and bits in (4, 8) and str(weights.get("scale_dtype")) == "torch.uint8":
        return FloatGrid("e2m1" if bits == 4 else "e4m3", 32, "e8m0")
    return FloatGrid("e2m1", 16, "e4m3") if strategy == "tensor_group" and (size, bits) == (16, 4) else None
