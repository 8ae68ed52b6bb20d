"""Why the loader of compressed-tensors in transformers cannot hold a module, and what would fit."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from penjing.formats.compressed_tensors.schema import Declared, has_layout
from penjing.models.layout import ModuleSpec
from penjing.numerics.float_grids import FloatGrid, ScaledGrid
from penjing.numerics.grids import IntegerGrid
from penjing.numerics.ternary import TernaryGrid
from penjing.representations import Activations, Scheme

_FLATTENED = re.compile(r"(^|\.)decoder\.layers\.\d+\.fc[12]$")
"""Linears that get all tokens of a batch as one matrix (OPT). For inputs of two dimensions the loader takes one scale
for the whole matrix, not one per token: results would depend on what else is in the batch."""


def grid_problems(module: ModuleSpec, grid: ScaledGrid) -> list[str]:
    """What is wrong with the grid on a matrix of this shape."""
    if isinstance(grid, IntegerGrid) and grid.zero != "integer":
        return [
            f"{module.name}: zero points that are not whole numbers (HQQ), and minima, have no place in "
            "compressed-tensors; use format native, or gguf for its types"
        ]
    if isinstance(grid, TernaryGrid):
        return [f"{module.name}: compressed-tensors has no ternary codes; use format native"]
    if isinstance(grid, IntegerGrid) and grid.scale_bits:
        return [f"{module.name}: scales in two levels (K-quants) have no place in compressed-tensors; use format gguf"]
    if isinstance(grid, FloatGrid) and not has_layout(grid):
        return [
            f"{module.name}: {grid.label} has no place in compressed-tensors, which knows fp8-e4m3 per channel, tensor "
            "or block, mxfp8, mxfp4 and nvfp4; use format native, or bitsandbytes for nf4 and fp4"
        ]
    columns, size = module.shape[1], grid.group_size
    if not isinstance(size, int) or columns % size == 0:
        return []
    if isinstance(grid, FloatGrid):
        return [
            f"groups of {size}, which {grid.name} has, do not divide the {columns} inputs of {module.name}; use "
            "another type, or format native, which stores a shorter last group"
        ]
    divisors = (width for width in range(16, columns + 1) if columns % width == 0)
    fits = sorted(divisors, key=lambda width: abs(math.log(width / size)))
    listed = ", ".join(str(width) for width in sorted(fits[:3]))
    return [
        f"group_size {size} does not divide the {columns} inputs of {module.name}; {listed} do; "
        "or use format native, which stores a shorter last group"
    ]


def module_problems(module: ModuleSpec, scheme: Scheme, grid: ScaledGrid) -> list[str]:
    """What is wrong with the module, whatever its shape."""
    name, problems = module.name, []
    if module.transposed:
        problems.append(
            f"{name} is a Conv1D (GPT-2), and the loader knows Linear and Embedding only; use format native"
        )
    if scheme.ordered:
        problems.append(
            f"{name}: columns grouped out of order need a group index, which compressed-tensors dropped; "
            "order columns with static groups, or use format native"
        )
    if module.expert and (scheme.activations is not None or not grid.symmetric):
        problems.append(
            f"{name}: transformers reads experts only with symmetric weights and without `activations`; "
            "use `symmetric: true` and no `activations`, or format native for zero points"
        )
    if module.expert and isinstance(grid, FloatGrid) and (grid.tile_rows > 1 or grid.scale != "plain"):
        problems.append(
            f"{name}: of float weights, transformers reads experts only as FP8 per channel or tensor; use one of "
            "those, or format native"
        )
    return problems + (_input_problems(module, scheme.activations, grid) if scheme.activations else [])


def _input_problems(module: ModuleSpec, how: Activations, grid: ScaledGrid) -> list[str]:
    name, problems = module.name, []
    if how.granularity == "token" and _FLATTENED.search(name):
        problems.append(
            f"{name}: OPT flattens the batch before it, and transformers would quantise all its tokens with one scale; "
            "ignore fc1 and fc2, or use format native"
        )
    if module.kind == "embedding":
        problems.append(f"{name}: the input of an embedding is a token number; drop `activations`")
    if how.threshold is not None:
        problems.append(f"{name}: compressed-tensors has no place for `threshold`; use format native")
    if isinstance(grid, FloatGrid) and how.kind != "float":
        problems.append(f"{name}: no engine multiplies {grid.name} weights and integer inputs; use inputs of type fp8")
    return problems


def decoded_at_load(groups: Mapping[Declared, list[ModuleSpec]]) -> str:
    """What needs `dequantize: true`, for people; empty when nothing does.

    Without it the loader leaves modules packed until the first forward pass, and for that makes empty packed tensors
    first: those it makes for zero points have the shape from before packing, and an embedding without `weight` fails.
    Floats with coded scales become bf16 then, even in a model of another dtype.
    """
    for told, modules in groups.items():
        if any(module.kind == "embedding" for module in modules):
            return "a quantised embedding"
        grid = told.grid
        if isinstance(grid, FloatGrid) and grid.scale != "plain":
            return f"{grid.name} weights"
        if not grid.symmetric and grid.group_size != "tensor" and told.layout.name == "pack-quantized":
            return "packed zero points"
    return ""


def expert_problems(schemes: Mapping[ModuleSpec, Scheme]) -> list[str]:
    """transformers fuses the experts, and decodes all experts of a model, or none, with one scheme."""
    holding = {replace(scheme, sparsity=0.0, pattern=None) for module, scheme in schemes.items() if module.expert}
    if not holding or (len(holding) == 1 and holding.pop().grid is not None):
        return []
    return [
        "a model with experts loads in transformers only if all its experts are quantised, with one scheme; "
        "target all experts in one step, or use format native"
    ]
