"""Recipe keys of methods that round to any grid with scales: integers, floats and quantiles, types of GGUF."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator

from penjing.methods.base import GridKeys
from penjing.numerics.float_grids import Element, FloatGrid, ScaledGrid, ScaleKind
from penjing.numerics.gguf_grids import GGUF_GRIDS
from penjing.numerics.grids import IntegerGrid
from penjing.numerics.scale_codes import ScaleRounding
from penjing.numerics.scale_search import ScaleSearch
from penjing.representations import Scheme

NumberType = Literal[
    "int", "nf4", "fp4", "fp8-e4m3", "fp8-e5m2", "mxfp4", "mxfp8", "nvfp4",
    "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl",
    "q6_k", "q5_k", "q4_k", "q3_k", "q2_k", "tq2_0", "tq1_0",
    "q5_k_m", "q4_k_m", "q4_k_s", "q3_k_l", "q3_k_m", "q2_k_m",
]  # fmt: skip

MIXES: dict[str, NumberType] = {
    "q5_k_m": "q5_k",
    "q4_k_m": "q4_k",
    "q4_k_s": "q4_k",
    "q3_k_l": "q3_k",
    "q3_k_m": "q3_k",
    "q2_k_m": "q2_k",
}
"""Types that stand for several, chosen per tensor when the model is known, and the one that most tensors get."""

SUPER_BLOCK = 256
"""Inputs in a super-block of GGUF."""

TILE_ROWS = 128
"""Outputs, and inputs, of a block with `group_size: block` (DeepSeek-V3, arXiv:2412.19437, section 3.3.2)."""


class _Float(NamedTuple):
    """What a type fixes, and the group size it has unless a recipe says otherwise."""

    bits: int
    element: Element
    scale: ScaleKind
    group_size: int | Literal["channel"]


FLOAT_TYPES: dict[str, _Float] = {
    "nf4": _Float(4, "nf4", "plain", 64),
    "fp4": _Float(4, "fp4", "plain", 64),
    "fp8-e4m3": _Float(8, "e4m3", "plain", "channel"),
    "fp8-e5m2": _Float(8, "e5m2", "plain", "channel"),
    "mxfp4": _Float(4, "e2m1", "e8m0", 32),
    "mxfp8": _Float(8, "e4m3", "e8m0", 32),
    "nvfp4": _Float(4, "e2m1", "e4m3", 16),
}


def _fixed_keys(kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a type fixes, and what it has unless a recipe says otherwise. A mix fixes what its commonest type does."""
    kind = MIXES.get(kind, kind)
    if kind in GGUF_GRIDS:
        grid = GGUF_GRIDS[kind]
        rule = grid.scale_rule if isinstance(grid, IntegerGrid) else "full"
        fixed = {"bits": grid.bits, "symmetric": grid.symmetric, "scale_rule": rule, "group_size": grid.group_size}
        return fixed, {}
    if kind not in FLOAT_TYPES:
        return {}, {}
    told = FLOAT_TYPES[kind]
    fixed = {"bits": told.bits, "symmetric": True, "scale_rule": "full"}
    return fixed | ({"group_size": told.group_size} if told.scale != "plain" else {}), {"group_size": told.group_size}


FALLBACK: dict[str, NumberType] = {
    "q6_k": "q8_0",
    "q5_k": "q5_0",
    "q4_k": "iq4_nl",
    "q3_k": "iq4_nl",
    "q2_k": "iq4_nl",
    "tq1_0": "q4_0",
    "tq2_0": "iq4_nl",
}
"""Types with blocks of 256, and what a row that does not divide into them gets: the closest in size from blocks of 32
that is not smaller, the better one of equals."""


class TypedGridOptions(GridKeys):
    """Recipe keys of the grid: an integer grid, or with `type` one that fixes the other keys."""

    type: NumberType = Field(
        "int",
        description="what a code stands for: an integer, a quantile (nf4), a 4-bit float as in bitsandbytes (fp4), "
        "an 8-bit float, a float in groups with a coded scale (mxfp4, mxfp8, nvfp4), one of GGUF's types (q4_0 ...), "
        "or a mix of them that is chosen per tensor as llama-quantize does (q4_k_m ...; its Q2_K is q2_k_m)",
    )
    double_quant: bool = Field(False, description="nf4 and fp4: quantise the scales once more, to 8 bits (QLoRA)")
    scale_rounding: ScaleRounding = Field(
        "round",
        description="mxfp4 and mxfp8: how the power of two of a group is chosen; `floor`: OCP, `round`: "
        "compressed-tensors, `ceil`: nothing is cut",
    )

    fallback: NumberType | None = Field(
        None,
        description="types with blocks of 256 (q2_k to q6_k, tq1_0, tq2_0) and mixes: the type of rows that do not "
        "divide into them; when not given the closest in size from blocks of 32, in mixes what llama-quantize gives "
        "them; the plan and the report name them",
    )

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, keys: Any) -> Any:
        """Set what the type fixes; refuse a key that says otherwise."""
        if not isinstance(keys, dict):
            return keys
        fixed, usual = _fixed_keys(str(keys.get("type")))
        for key, value in fixed.items():
            if keys.get(key, value) != value:
                raise ValueError(f"type {keys['type']} fixes `{key}: {value}`; drop the key")
        return {**usual, **keys, **fixed}

    @model_validator(mode="after")
    def _check_type(self) -> Self:
        if self.double_quant and (self.type not in ("nf4", "fp4") or self.group_size == "tensor"):
            raise ValueError("`double_quant` quantises the scales of groups or rows of type nf4 or fp4")
        if self.scale_rounding != "round" and self.type not in ("mxfp4", "mxfp8"):
            raise ValueError(f"`scale_rounding` chooses a power of two; scales of type {self.type} are none")
        small = [kind for kind in GGUF_GRIDS if kind not in FALLBACK]
        large = (*FALLBACK, *MIXES)
        if self.fallback is not None and (self.type not in large or self.fallback not in small):
            raise ValueError(f"`fallback` goes with {', '.join(large)} and is one of {', '.join(small)}")
        if self.group_size == "block" and not self.type.startswith("fp8"):
            raise ValueError(f"`group_size: block` ({TILE_ROWS} x {TILE_ROWS}) goes with type fp8-e4m3 or fp8-e5m2")
        return self

    @property
    def row_wise(self) -> bool:
        """Whether every row is rounded by itself. NVFP4 counts: its one shared number may well be that of a stack, and
        engines that merge q, k and v want it so."""
        return self.group_size not in ("tensor", "block") and not self.double_quant

    @property
    def fits_group_by_group(self) -> bool:
        """Whether the scale of a group follows from that group alone."""
        return self.row_wise and self.type not in ("nvfp4", *FALLBACK, *MIXES)

    def _fitting(self, columns: int) -> NumberType:
        """The type of rows of so many inputs."""
        if self.type not in FALLBACK or columns % SUPER_BLOCK == 0:
            return self.type
        return self.fallback or FALLBACK[self.type]

    def for_matrix(self, shape: tuple[int, ...], storage_dtype: torch.dtype) -> Self:
        """The same keys, of the type that such rows get."""
        kind = self._fitting(shape[1])
        return self if kind == self.type else self.of_type(kind)

    def of_type(self, kind: NumberType, fallback: NumberType | None = None) -> Self:
        """The same keys, but those that the types fix."""
        fixed, _ = _fixed_keys(self.type)
        kept = {key: value for key, value in self.model_dump(exclude_unset=True).items() if key not in fixed}
        return type(self).model_validate({**kept, "type": kind, "fallback": fallback})

    def remark(self, shape: tuple[int, ...]) -> str:
        """Which type takes the place of one whose blocks do not divide the rows."""
        kind = self._fitting(shape[1])
        return (
            "" if kind == self.type else f"{kind} instead of {self.type}, whose blocks of 256 do not divide {shape[1]}"
        )

    def grid(self, scale_dtype: torch.dtype) -> ScaledGrid:
        """The grid these keys describe; plain scales of integers and FP8 are stored in `scale_dtype`, others as the
        type says."""
        size = None if self.group_size == "channel" else self.group_size
        kind = FLOAT_TYPES.get(self.type)
        if (name := MIXES.get(self.type, self.type)) in GGUF_GRIDS:
            return GGUF_GRIDS[name]
        if size == "block":
            return FloatGrid(FLOAT_TYPES[self.type].element, TILE_ROWS, "plain", scale_dtype, tile_rows=TILE_ROWS)
        if kind is None:
            return IntegerGrid(self.bits, size, self.symmetric, self.scale_rule, scale_dtype)
        if self.type.startswith("fp8"):
            return FloatGrid(kind.element, size, "plain", scale_dtype)
        return FloatGrid(
            kind.element, size, "nested" if self.double_quant else kind.scale, rounding=self.scale_rounding
        )

    def scheme(self, before: Scheme, storage_dtype: torch.dtype) -> Scheme:
        return replace(before, grid=self.grid(storage_dtype))


class SearchedGridOptions(TypedGridOptions):
    """The same for methods that can look for better scales than a rule gives."""

    scale_search: ScaleSearch = Field(
        "none",
        description="type int, or one of GGUF's: search scale and zero point of each group for the least error of "
        "the weights, as they are, weighed by the mean squares of the inputs (diagonal) or by their Gram matrix; a "
        "scale may become negative",
    )
    zero: Literal["integer", "float"] = Field(
        "integer",
        description="asymmetric grids of type int: zero points are whole numbers, stored like codes, or any numbers, "
        "stored like scales (native format)",
    )

    @model_validator(mode="after")
    def _check_zero(self) -> Self:
        if self.zero == "float" and (self.symmetric or self.type != "int"):
            raise ValueError("`zero: float` is about zero points; it goes with `symmetric: false` and type int")
        return self

    def grid(self, scale_dtype: torch.dtype) -> ScaledGrid:
        grid = super().grid(scale_dtype)
        return replace(grid, zero="float") if self.zero == "float" and isinstance(grid, IntegerGrid) else grid

    @model_validator(mode="after")
    def _check_search(self) -> Self:
        if self.scale_search != "none" and self.type in FLOAT_TYPES:
            raise ValueError(
                f"`scale_search` looks for scales of integers and GGUF types; type {self.type} has its own"
            )
        return self
