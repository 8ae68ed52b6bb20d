"""LLM.int8() as bitsandbytes stores it: the half of format `bitsandbytes` whose linears multiply integers.

Per linear, by name after the module's:

    weight         int8 (N, K): codes B
    SCB            fp32 (N,): what the code 127 of each row stands for
    weight_format  uint8 (): 0, rows as they are

so that w_hat = B SCB / 127. Inputs are always rounded, to 8 bits per token, those of outlier columns excepted; the
library rounds them to fp16 first, and a token's scale also covers the smaller inputs of outlier columns, which are not
multiplied by it: logits differ from those of Penjing by some inputs that fall to the other side of a step.

Scales are stored elsewhere as t = SCB / 127, rounded to their type. In bf16 and fp16, 127 t is exact in fp32. In fp32,
t was made as max|w| / 127, so one of the neighbours of 127 t, max|w| at the latest, divides to t again.

Worked example: the row (1.27, -0.5) has t = 0.01, B = (127, -50) and SCB = 1.27.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from penjing.errors import FormatError
from penjing.models.layout import ModuleSpec
from penjing.numerics.activations import Activations
from penjing.numerics.grids import Grid, IntegerGrid
from penjing.representations import Quantized, Scheme

LARGEST = 127


def holds(grid: Grid | None) -> bool:
    """Whether the codes of a grid are signed bytes with one scale per row."""
    return isinstance(grid, IntegerGrid) and grid.bits == 8 and grid.symmetric and grid.group_size is None


def problems(name: str, scheme: Scheme) -> list[str]:
    """What the library does not do with such a linear; empty when all is well."""
    how = scheme.activations
    if how is None:
        return [f"{name}: bitsandbytes rounds the inputs of 8-bit linears as well; use method llm-int8"]
    if how != Activations(threshold=how.threshold):
        return [f"{name}: bitsandbytes rounds inputs to 8 bits per token as they come; use method llm-int8"]
    if scheme.columns or scheme.outliers:
        return [f"{name}: bitsandbytes keeps nothing beside 8-bit codes; use format native"]
    return []


def nbytes(module: ModuleSpec) -> int:
    """Bytes of the three tensors."""
    rows, columns = module.shape
    return rows * columns + 4 * rows + 1


def pack(module: ModuleSpec, weight: Quantized) -> dict[str, Tensor]:
    """Tensors by full name. Raises FormatError for fp32 scales that no SCB divides to."""
    scale = weight.scale.flatten()
    best = scale.float() * LARGEST
    for other in (torch.nextafter(best, torch.full_like(best, torch.inf)), torch.nextafter(best, best.new_zeros(()))):
        best = torch.where(_scales(best, scale.dtype) == scale, best, other)
    if not torch.equal(_scales(best, scale.dtype), scale):
        raise FormatError(
            f"{module.name}: scales in fp32 that are not max|w| / 127 cannot be stored to the bit; use "
            "`dtype: bfloat16`"
        )
    return {
        f"{module.name}.weight": weight.codes,
        f"{module.name}.SCB": best,
        f"{module.name}.weight_format": torch.tensor(0, dtype=torch.uint8),
    }


def unpack(module: ModuleSpec, grid: IntegerGrid, load: Callable[[str], Tensor]) -> Quantized:
    """Codes and scales back. Raises FormatError when the file does not hold them."""
    codes, largest = load(f"{module.name}.weight"), load(f"{module.name}.SCB")
    if codes.dtype != torch.int8 or codes.shape != module.shape or largest.numel() != len(codes):
        raise FormatError(
            f"{module.name}.weight is {tuple(codes.shape)} in {codes.dtype} with {largest.numel()} scales, but "
            f"config.json makes it {module.shape} in int8"
        )
    if load(f"{module.name}.weight_format").item() != 0:
        raise FormatError(f"{module.name}: only rows as they are (weight_format 0) can be read")
    return Quantized(codes, _scales(largest.float().reshape(-1, 1), grid.scale_dtype), None, grid)


def _scales(largest: Tensor, dtype: torch.dtype) -> Tensor:
    return (largest / LARGEST).to(dtype)


def config(scheme: Scheme) -> dict[str, Any]:
    """Keys of `quantization_config`."""
    assert scheme.activations is not None
    return {
        "load_in_4bit": False,
        "load_in_8bit": True,
        "llm_int8_threshold": scheme.activations.threshold or 0.0,
        "llm_int8_has_fp16_weight": False,
    }


def scheme(told: Mapping[str, Any]) -> Scheme:
    """The inverse of `config`; the library's own defaults where a key is missing."""
    threshold = float(told.get("llm_int8_threshold", 6.0))
    return Scheme(IntegerGrid(8, None, scale_dtype=torch.float32), activations=Activations(threshold=threshold or None))
