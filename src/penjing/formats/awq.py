"""Checkpoints of AWQ's GEMM layout, which vLLM, SGLang and transformers (with gptqmodel) read.

Per weight (N outputs, K inputs, G groups), by name after the module's; codes are unsigned 4-bit, code + 8:

    qweight  int32 (K, N / 8): eight outputs of one input to a word
    qzeros   int32 (G, N / 8): zero points of a group, likewise
    scales   (G, N)

Bits 4i to 4i + 3 of a word hold output 0, 2, 4, 6, 1, 3, 5, 7 of its eight, for i = 0 to 7: halves of the word then
unpack into neighbouring outputs. Weights are `scale * (code - zero)`; a symmetric grid has zero points of 8.

Example: outputs with the unsigned codes 0, 1, ..., 7 make the word 0x75316420.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from penjing.errors import FormatError
from penjing.formats import words
from penjing.formats.base import codes_of, other_bytes, plain_bytes, plain_weight, read_plain_weight
from penjing.models.layout import ModuleSpec
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Dense, Quantized, Representation, Scheme

_BITS = 4
_ZERO = 2 ** (_BITS - 1)
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs lies where in a word, from its lowest bits."""


class AWQFormat:
    """Linears of the blocks as 4-bit codes of one group size; everything else stays plain."""

    name = "awq"
    summary = "AWQ checkpoints (GEMM layout): 4 bits for vLLM, SGLang and transformers with gptqmodel"
    multiplies_integers = False

    def problems(self, module: ModuleSpec, scheme: Scheme) -> list[str]:
        """What the layout has no place for."""
        found = words.problems(self.name, module, scheme, (_BITS,))
        if scheme.ordered and not found:
            found.append(f"{module.name}: format awq has no group index; use static groups, or format gptq")
        return found

    def conflicts(self, schemes: Mapping[ModuleSpec, Scheme]) -> list[str]:
        """config.json tells of one group size."""
        return words.conflicts(self.name, schemes)

    def nbytes(self, module: ModuleSpec, scheme: Scheme, dtype: torch.dtype) -> int:
        """Exact bytes of the module's tensors."""
        grid = scheme.grid
        if not isinstance(grid, IntegerGrid):
            return plain_bytes(module, dtype)
        rows, columns = module.shape
        groups = grid.groups(columns)
        return other_bytes(module, dtype) + (columns + groups) * rows // 2 + groups * rows * grid.scale_dtype.itemsize

    def pack(self, module: ModuleSpec, scheme: Scheme, weight: Representation, dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors by full name; removed weights get the code that decodes to zero."""
        quantized = codes_of(weight)
        if quantized is None and scheme.grid is None:
            return plain_weight(module, weight, dtype)
        if quantized is None or quantized.grid != scheme.grid or quantized.group_index is not None:
            raise FormatError(f"{module.name}: the weight is not what its scheme says ({scheme})")
        zero = quantized.zero_point
        zero = torch.zeros(quantized.scale.shape, dtype=torch.int8) if zero is None else zero
        tensors = {
            "qweight": _interleaved(quantized.codes.T),
            "qzeros": _interleaved(zero.T),
            "scales": quantized.scale.T,
        }
        return {f"{module.name}.{key}": tensor.contiguous() for key, tensor in tensors.items()}

    def unpack(self, module: ModuleSpec, scheme: Scheme, load: Callable[[str], Tensor]) -> Representation:
        """Codes, scales and zero points back; FormatError when the file does not hold what config.json says."""
        grid = scheme.grid
        if not isinstance(grid, IntegerGrid):
            return Dense(read_plain_weight(module, load))
        (rows, columns), groups = module.shape, grid.groups(module.shape[1])
        shapes = {"qweight": (columns, rows // 8), "qzeros": (groups, rows // 8), "scales": (groups, rows)}
        stored = words.load_all(module, shapes, load)
        codes, zero = (_straight(stored[key], rows).T.contiguous() for key in ("qweight", "qzeros"))
        if grid.symmetric and bool(zero.any()):
            raise FormatError(f"{module.name}.qzeros differ from {_ZERO}, but config.json says `sym`: true")
        return Quantized(codes, stored["scales"].T.contiguous(), None if grid.symmetric else zero, grid)

    def decode(self, weight: Representation, dtype: torch.dtype) -> Tensor:
        """The matrix (N, K): scales in `dtype`, exact products rounded once."""
        return words.decode(weight, dtype)

    def config(self, schemes: Mapping[ModuleSpec, Scheme], dtype: torch.dtype) -> dict[str, Any]:
        """`quantization_config` as AutoAWQ wrote it; empty when nothing is quantised."""
        grid = words.one_grid(self.name, schemes)
        if grid is None:
            return {}
        chosen = set(words.quantised(schemes))
        left = [module.name for module in words.linears_of_blocks(schemes) if module not in chosen]
        return {
            "quantization_config": {
                "quant_method": "awq",
                "version": "gemm",
                "bits": _BITS,
                "group_size": grid.group_size or -1,
                "zero_point": True,
                "sym": grid.symmetric,
                "modules_to_not_convert": [*left, "lm_head"],
            }
        }

    def schemes(self, config: dict[str, Any], modules: tuple[ModuleSpec, ...]) -> dict[str, Scheme]:
        """Module name -> scheme of every linear of the blocks that `quantization_config` does not leave out."""
        told = config["quantization_config"]
        if str(told.get("version", "gemm")).lower() != "gemm" or told["bits"] != _BITS:
            raise FormatError("config.json has another layout of AWQ; penjing reads 4 bits in the GEMM layout")
        grid = words.read_grid(config, _BITS, told.get("group_size", 128), told.get("sym", False))
        left = told.get("modules_to_not_convert") or []
        return {
            module.name: Scheme(grid)
            for module in words.linears_of_blocks(modules)
            if not any(name in module.name for name in left)
        }


def _interleaved(values: Tensor) -> Tensor:
    """Signed codes (R, N) -> words (R, N / 8)."""
    rows, count = values.shape
    return words.to_words(values.reshape(rows, count // 8, 8)[..., list(ORDER)].reshape(rows, count), _ZERO, _BITS)


def _straight(stored: Tensor, count: int) -> Tensor:
    """The inverse of `_interleaved`: -> (R, count) int8."""
    values = words.from_words(stored, _ZERO, _BITS, count).reshape(len(stored), -1, 8)
    return values[..., torch.tensor(ORDER).argsort()].reshape(len(stored), count)
