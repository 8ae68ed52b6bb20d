"""The format itself: what it holds, how a matrix is written and read, what config.json says, and its graph."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penjing.checkpoint.writing import write_bytes
from penjing.errors import FormatError, MissingDependency
from penjing.formats.base import (
    codes_of,
    input_bytes,
    other_bytes,
    plain_bytes,
    plain_weight,
    read_plain_weight,
)
from penjing.formats.native.layout import read_scheme, scheme_entry
from penjing.formats.onnx.layouts import layout_of, problems
from penjing.formats.targets import find_target, summarise
from penjing.models.layout import Layout, ModuleSpec
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Dense, Representation, Scheme

GRAPH = "model.onnx"
_METHOD, _VERSION = "penjing-onnx", 1


class OnnxFormat:
    """A decoder with its key-value cache for ONNX Runtime: a graph, and shards that hold its weights."""

    name = "onnx"
    summary = "a decoder for ONNX Runtime: 2-, 4- and 8-bit blocks, int8 with rounded inputs, or dense"
    multiplies_integers = True

    def refusals(self, layout: Layout, config: Mapping[str, Any]) -> list[str]:
        """Why there is no graph for a model, whatever becomes of its weights; raises MissingDependency without onnx."""
        missing = [name for name in ("onnx", "onnxruntime") if importlib.util.find_spec(name) is None]
        if missing:
            raise MissingDependency(f"format onnx needs {' and '.join(missing)}: pip install 'penjing[onnx]'")
        from penjing.formats.onnx.facts import refusals

        return refusals(layout, config)

    def problems(self, module: ModuleSpec, scheme: Scheme) -> list[str]:
        """What no operator multiplies."""
        return problems(module, scheme)

    def conflicts(self, schemes: Mapping[ModuleSpec, Scheme]) -> list[str]:
        """None: every module has operators of its own."""
        return []

    def nbytes(self, module: ModuleSpec, scheme: Scheme, dtype: torch.dtype) -> int:
        """Exact bytes of the module's tensors; the graph comes on top."""
        layout = layout_of(scheme)
        if layout is None or not isinstance(scheme.grid, IntegerGrid):
            return plain_bytes(module, dtype)
        return other_bytes(module, dtype) + input_bytes(scheme) + layout.nbytes(module.shape, scheme.grid)

    def pack(self, module: ModuleSpec, scheme: Scheme, weight: Representation, dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors by full name; removed weights get the code that decodes to zero."""
        quantized, layout = codes_of(weight), layout_of(scheme)
        if quantized is None and layout is None:
            return plain_weight(module, weight, dtype)
        grid = scheme.grid
        if quantized is None or layout is None or not isinstance(grid, IntegerGrid) or quantized.grid != grid:
            raise FormatError(f"{module.name}: the weight is not what its scheme says ({scheme})")
        return {f"{module.name}.{key}": tensor for key, tensor in layout.write(quantized, grid).items()}

    def unpack(self, module: ModuleSpec, scheme: Scheme, load: Callable[[str], Tensor]) -> Representation:
        """Codes, scales and zero points back; FormatError when the file does not hold what config.json says."""
        layout, (rows, columns) = layout_of(scheme), module.shape
        if layout is None or not isinstance(scheme.grid, IntegerGrid):
            return Dense(read_plain_weight(module, load))
        try:
            return layout.read(lambda key: load(f"{module.name}.{key}"), (rows, columns), scheme.grid)
        except FormatError as error:
            raise FormatError(f"{module.name}.{error}") from error

    def decode(self, weight: Representation, dtype: torch.dtype) -> Tensor:
        """The matrix (N, K): scales are turned to fp32 when the graph is loaded, products rounded once."""
        return weight.dense().to(dtype)

    def config(self, schemes: Mapping[ModuleSpec, Scheme], dtype: torch.dtype) -> dict[str, Any]:
        """`quantization_config` with one entry per distinct scheme, for Penjing's own reader."""
        groups: dict[Scheme, list[str]] = {}
        for module, scheme in schemes.items():
            if not scheme.dense:
                groups.setdefault(replace(scheme, sparsity=0.0, pattern=None), []).append(module.name)
        everything = [module.name for module in schemes]
        entries = [
            {"targets": summarise(names, everything), **scheme_entry(scheme)} for scheme, names in groups.items()
        ]
        return {"quantization_config": {"quant_method": _METHOD, "version": _VERSION, "schemes": entries}}

    def schemes(self, config: dict[str, Any], modules: tuple[ModuleSpec, ...]) -> dict[str, Scheme]:
        """Module name -> scheme of every module that config.json lists."""
        declared = config["quantization_config"]
        if declared.get("version") != _VERSION:
            raise FormatError(
                f"this model has version {declared.get('version')} of the layout and this penjing reads version "
                f"{_VERSION}; upgrade with `pip install -U penjing`"
            )
        by_target = {target: read_scheme(entry) for entry in declared["schemes"] for target in entry["targets"]}
        found = {module.name: find_target(module, list(by_target)) for module in modules if "weight" in module.tensors}
        return {name: by_target[target] for name, target in found.items() if target is not None}

    def write_beside(self, directory: Path, layout: Layout, config: Mapping[str, Any]) -> list[str]:
        """The graph, which names the tensors of the shards in `directory`; returns the names of the files written."""
        from penjing.formats.onnx.decoder import decoder

        schemes = self.schemes(dict(config), layout.modules)
        graph = decoder(directory, layout, config, schemes)
        write_bytes(directory / GRAPH, graph.SerializeToString())
        return [GRAPH]
