"""The format behind `format: gguf`: modules as blocks while the walk goes on, one file of them at its end."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penjing.checkpoint.base import Checkpoint
from penjing.errors import FormatError
from penjing.formats.base import Finished, codes_of, plain_weight, read_plain_weight
from penjing.formats.gguf.types import blocks_of, type_of
from penjing.models.layout import Layout, ModuleSpec
from penjing.numerics.finite import all_finite
from penjing.numerics.float_grids import FloatGrid
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Dense, Representation, Scheme


class GGUFFormat:
    """Tensors are kept as the bytes of their blocks, uint8 (N, bytes of a row), until the file is put together.

    Vectors are fp32, as llama.cpp wants them.
    """

    name = "gguf"
    multiplies_integers = False
    summary = "one file for llama.cpp and what is built on it; types q8_0 to q2_k, written with the codes as chosen"
    vector_dtype = torch.float32

    def problems(self, module: ModuleSpec, scheme: Scheme) -> list[str]:
        """Only GGUF's own grids fit, in rows of whole blocks."""
        name, grid = module.name, scheme.grid
        if scheme.activations is not None:
            return [f"{name}: llama.cpp rounds inputs in its own way and a file cannot say how; drop `activations`"]
        if grid is None:
            return []
        if scheme.ordered or scheme.columns or scheme.outliers:
            return [f"{name}: blocks are consecutive inputs with nothing beside them; use rtn, gptq, awq or autoround"]
        held = type_of(grid)
        if held is None:
            return [
                f"{name}: no type of GGUF holds W{grid.bits} {grid.label}; choose a `type` such as q8_0, q4_0 or "
                "q4_k, or format native"
            ]
        if scheme.sparsity and not has_zero(grid):
            return [f"{name}: {held.lower()} has no exact zero for removed weights; use q4_0, q5_0 or q8_0"]
        width, columns = blocks_of(grid).width, module.shape[1]
        if columns % width:
            return [f"{name}: rows of {columns} inputs are no whole blocks of {width}, which {held.lower()} has"]
        return []

    def conflicts(self, schemes: Mapping[ModuleSpec, Scheme]) -> list[str]:
        """None: every tensor has a type of its own."""
        return []

    def nbytes(self, module: ModuleSpec, scheme: Scheme, dtype: torch.dtype) -> int:
        """Bytes of the module's tensors in the file, without padding."""
        total = 0
        for key, shape in module.tensors.items():
            if key == "weight" and scheme.grid is not None:
                blocks = blocks_of(scheme.grid)
                total += math.prod(shape) // blocks.width * blocks.size
            else:
                total += math.prod(shape) * (self.vector_dtype if len(shape) == 1 else dtype).itemsize
        return total

    def pack(self, module: ModuleSpec, scheme: Scheme, weight: Representation, dtype: torch.dtype) -> dict[str, Tensor]:
        """`<module>.weight` as blocks; plain for a weight that lies on no grid."""
        if scheme.grid is None:
            return plain_weight(module, weight, dtype)
        coded = codes_of(weight)
        if coded is None or coded.grid != scheme.grid:
            raise FormatError(f"{module.name}: the weight is not what its scheme says ({scheme})")
        if not all_finite(coded.scale):
            raise FormatError(f"{module.name}: a scale does not fit fp16; scale the weights down or leave it dense")
        return {f"{module.name}.weight": blocks_of(scheme.grid).write(coded)}

    def unpack(self, module: ModuleSpec, scheme: Scheme, load: Callable[[str], Tensor]) -> Representation:
        """Codes, scales and minima back."""
        if scheme.grid is None:
            return Dense(read_plain_weight(module, load))
        rows, columns = module.shape
        blocks, stored = blocks_of(scheme.grid), load(f"{module.name}.weight")
        if tuple(stored.shape) != (rows, columns // blocks.width * blocks.size):
            raise FormatError(f"{module.name}: {tuple(stored.shape)} bytes are not {(rows, columns)} as {scheme}")
        return blocks.read(stored, columns)

    def decode(self, weight: Representation, dtype: torch.dtype) -> Tensor:
        """The matrix (N, K): products in fp32, rounded once. Removed weights have the code of zero."""
        return weight.dense().to(dtype)

    def config(self, schemes: Mapping[ModuleSpec, Scheme], dtype: torch.dtype) -> dict[str, Any]:
        """Nothing: the file says of every tensor what it is."""
        return {}

    def schemes(self, config: dict[str, Any], modules: tuple[ModuleSpec, ...]) -> dict[str, Scheme]:
        """Nothing: a GGUF file is read as the values it stands for."""
        return {}

    def refusals(self, layout: Layout, config: Mapping[str, Any]) -> list[str]:
        """Why llama.cpp could not run the model, whatever becomes of its weights."""
        from penjing.formats.gguf.assembly import refusals

        return refusals(layout, config)

    def companion_problems(self, checkpoint: Checkpoint) -> list[str]:
        """Why the tokenizer cannot be written."""
        from penjing.formats.gguf.assembly import tokenizer_problems

        return tokenizer_problems(checkpoint)

    def assemble(self, finished: Finished) -> Path:
        """Write `<name of the directory>.gguf` into the directory; one tensor is in memory at a time."""
        from penjing.formats.gguf.assembly import assemble

        return assemble(finished)


def has_zero(grid: object) -> bool:
    """Whether some code of the grid decodes to exactly zero, whatever the scale."""
    if isinstance(grid, IntegerGrid):
        return grid.symmetric
    return isinstance(grid, FloatGrid) and grid.element != "iq4_nl"
