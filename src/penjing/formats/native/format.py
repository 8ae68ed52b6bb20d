"""The native format: any representation on any matrix, described module by module in config.json."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from penjing.errors import FormatError
from penjing.formats.base import input_bytes, other_bytes, plain_bytes, plain_weight, read_plain_weight
from penjing.formats.native.layout import (
    decode,
    from_parts,
    is_packed,
    part_names,
    parts_bytes,
    read_scheme,
    scheme_entry,
    to_parts,
)
from penjing.formats.targets import find_target, summarise
from penjing.models.layout import ModuleSpec
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Dense, Masked, Representation, Scheme

VERSION = 1
"""Of the layout; a reader refuses any other."""


class NativeFormat:
    """Every scheme Penjing knows: any group size, order, sparsity, embeddings, tied heads, Conv1D."""

    name = "native"
    multiplies_integers = True
    summary = "everything Penjing can make, at its exact bit width; transformers loads it after `import penjing`"

    def problems(self, module: ModuleSpec, scheme: Scheme) -> list[str]:
        """K-quants are GGUF's. Else only inputs can be out of reach: an embedding has none, and transformers multiplies
        all experts at once."""
        if isinstance(scheme.grid, IntegerGrid) and scheme.grid.scale_bits:
            return [f"{module.name}: scales in two levels (K-quants) have no place here; use format gguf"]
        if scheme.activations is None:
            return []
        if module.kind == "embedding":
            return [f"{module.name}: the input of an embedding is a token number; drop `activations`"]
        if module.expert:
            return [f"{module.name}: transformers fuses the experts and hides their inputs; drop `activations`"]
        return []

    def conflicts(self, schemes: Mapping[ModuleSpec, Scheme]) -> list[str]:
        """Experts of one kind are loaded into one tensor and must look alike on disk."""
        return expert_conflicts(schemes)

    def nbytes(self, module: ModuleSpec, scheme: Scheme, dtype: torch.dtype) -> int:
        """Exact bytes; for unstructured sparsity exact up to the rounding of the number of survivors."""
        if not is_packed(scheme):
            return plain_bytes(module, dtype) + input_bytes(scheme)
        kept = survivors(module.shape, scheme)
        packed = parts_bytes(module.shape, scheme, kept, dtype.itemsize)
        return other_bytes(module, dtype) + packed + input_bytes(scheme)

    def pack(self, module: ModuleSpec, scheme: Scheme, weight: Representation, dtype: torch.dtype) -> dict[str, Tensor]:
        """Packed parts by full name, or a plain tensor for a weight to which nothing was done."""
        if is_packed(scheme) != (not isinstance(weight, Dense)):
            raise FormatError(f"{module.name}: the weight is not what its scheme says ({scheme})")
        if isinstance(weight, Dense):
            return plain_weight(module, weight, dtype)
        if isinstance(weight, Masked) and isinstance(weight.values, Dense):
            weight = Masked(Dense(weight.values.values.to(dtype)), weight.kept)
        return {f"{module.name}.weight_{part}": tensor for part, tensor in to_parts(weight, scheme).items()}

    def unpack(self, module: ModuleSpec, scheme: Scheme, load: Callable[[str], Tensor]) -> Representation:
        """The representation back; raises FormatError when the file does not hold what config.json says."""
        if not is_packed(scheme):
            return Dense(read_plain_weight(module, load))
        parts = {part: load(f"{module.name}.weight_{part}") for part in part_names(scheme)}
        weight, stored = from_parts(parts, module.name)
        if tuple(weight.shape) != module.shape or stored != scheme:
            raise FormatError(
                f"{module.name}: the file holds {tuple(weight.shape)} as {stored}, "
                f"but config.json says {module.shape} as {scheme}"
            )
        return weight

    def decode(self, weight: Representation, dtype: torch.dtype) -> Tensor:
        """The matrix (N, K) that the loaded model holds: products in fp32, rounded once to `dtype`."""
        return decode(weight, dtype)

    def config(self, schemes: Mapping[ModuleSpec, Scheme], dtype: torch.dtype) -> dict[str, Any]:
        """`quantization_config` with one entry per distinct scheme; empty when nothing was done.

        It is there, too, when all is dense but some linears share weights, so that the loader is called.
        """
        groups: dict[Scheme, list[str]] = {}
        for module, scheme in schemes.items():
            if not scheme.dense:
                groups.setdefault(scheme, []).append(module.name)
        if not groups and not any(module.owner for module in schemes):
            return {}
        everything = [module.name for module in schemes if not module.owner]
        entries = [
            {"targets": summarise(names, everything), **scheme_entry(scheme)} for scheme, names in groups.items()
        ]
        return {"quantization_config": {"quant_method": "penjing", "version": VERSION, "schemes": entries}}

    def schemes(self, config: dict[str, Any], modules: tuple[ModuleSpec, ...]) -> dict[str, Scheme]:
        """Module name -> scheme of every module that config.json lists."""
        by_target = read_schemes(config["quantization_config"])
        targets = list(by_target)
        found = {module.name: find_target(module, targets) for module in modules if "weight" in module.tensors}
        return {name: by_target[target] for name, target in found.items() if target is not None}


def expert_conflicts(schemes: Mapping[ModuleSpec, Scheme]) -> list[str]:
    """Blocks whose experts have different schemes for the same projection, as messages."""
    seen: dict[str, Scheme] = {}
    problems = {}
    for module, scheme in schemes.items():
        before, found, after = module.name.partition(".experts.")
        if found:
            projection = f"{before}.experts.*.{after.partition('.')[2]}"
            if seen.setdefault(projection, scheme) != scheme:
                problems[projection] = f"{projection}: transformers fuses these experts, so they need one scheme"
    return list(problems.values())


def survivors(shape: tuple[int, ...], scheme: Scheme) -> int:
    """Weights that stay after pruning a matrix of `shape`."""
    rows, columns = shape
    if scheme.pattern is not None:
        zeros, of = scheme.pattern
        return rows * (columns - columns // of * zeros)
    return rows * columns - round(rows * columns * scheme.sparsity)


def read_schemes(declared: Mapping[str, Any]) -> dict[str, Scheme]:
    """Target -> scheme of a `quantization_config` that this format wrote."""
    if declared.get("version") != VERSION:
        raise FormatError(
            f"this checkpoint has version {declared.get('version')} of penjing's native format and this penjing reads "
            f"version {VERSION}; upgrade with `pip install -U penjing`"
        )
    return {target: read_scheme(entry) for entry in declared["schemes"] for target in entry["targets"]}
