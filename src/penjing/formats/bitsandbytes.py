"""The 4-bit format of bitsandbytes (QLoRA), loaded by stock transformers with that package; for its 8-bit one see
`bitsandbytes_int8`.

Blocks run over the matrix in row order; here they must divide a row. Per weight, by name after the module's:

    weight                                 uint8 (N * K / 2, 1): codes, the first of a pair in the high half
    weight.absmax                          fp32 (N * K / block,), or uint8 when double-quantised
    weight.quant_map                       fp32 (16,): what every code stands for
    weight.nested_absmax, nested_quant_map fp32 (blocks of 256,) and (256,): scale and map of double-quantised scales
    weight.quant_state.bitsandbytes__nf4   uint8: JSON with block size, shape, dtype, and the offset of nested scales

The loader decodes `quant_map[code] * absmax` in fp32 and rounds to the compute dtype, which is fp32 here as in the
library: set `bnb_4bit_compute_dtype` in config.json to bfloat16 for speed on a GPU.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from penjing.errors import FormatError, MissingDependency
from penjing.formats import bitsandbytes_int8 as int8
from penjing.formats.base import codes_of, other_bytes, plain_bytes, plain_weight, read_plain_weight
from penjing.formats.targets import class_of
from penjing.models.layout import ModuleSpec
from penjing.numerics.float_grids import FloatGrid, elements
from penjing.numerics.grids import IntegerGrid
from penjing.numerics.packing import pack_bits, unpack_bits
from penjing.numerics.scale_codes import BLOCK, ScaleCodes, dynamic_map
from penjing.representations import Dense, Quantized, Representation, Scheme

_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
_HEADS = ("lm_head", "embed_out")
"""Names of heads: the loader must be told to leave them, also when they are tied and so not in the file."""
_NUMBER = 24
"""Characters of the longest float in JSON: the offset is padded to it, so that the plan knows the bytes."""


class BitsAndBytesFormat:
    """NF4 and FP4 in blocks, with plain or double-quantised scales; 8-bit integers per row with rounded inputs."""

    name = "bitsandbytes"
    summary = "NF4 and FP4 (QLoRA) and LLM.int8() for transformers, PEFT and vLLM with the bitsandbytes package"
    multiplies_integers = True

    def problems(self, module: ModuleSpec, scheme: Scheme) -> list[str]:
        """What bitsandbytes has no place for; raises MissingDependency without it."""
        grid, name = scheme.grid, module.name
        if scheme.activations is not None and not int8.holds(grid):
            return [f"{name}: bitsandbytes rounds inputs only beside 8 bits per row (llm-int8); drop `activations`"]
        if scheme.rank or scheme.correction or scheme.train:
            return [f"{name}: neither factors nor tensor trains have a place in bitsandbytes; use format native"]
        if grid is None:
            return []
        _require_library()
        if int8.holds(grid):
            return int8.problems(name, scheme) + _places(module)
        if not isinstance(grid, FloatGrid) or grid.element not in ("nf4", "fp4") or scheme.columns or scheme.outliers:
            return [
                f"{name}: bitsandbytes stores types nf4 and fp4, and 8 bits per row with rounded inputs (llm-int8); "
                "use format native or compressed-tensors"
            ]
        columns, size = module.shape[1], grid.group_size
        problems = []
        if size not in _SIZES or columns % size:
            fits = ", ".join(str(size) for size in _SIZES if columns % size == 0)
            problems.append(
                f"group_size {size or 'channel'} on the {columns} inputs of {name}: bitsandbytes has blocks of "
                f"{_SIZES[0]} to {_SIZES[-1]}, and they must divide a row; "
                + (f"use {fits}" if fits else "use format native")
            )
        if scheme.ordered:
            problems.append(f"{name}: bitsandbytes has no group index; order columns with static groups")
        return problems + _places(module)

    def conflicts(self, schemes: Mapping[ModuleSpec, Scheme]) -> list[str]:
        """config.json tells of one type for the whole model."""
        kinds = {(scheme.grid, scheme.activations) for scheme in schemes.values() if scheme.grid is not None}
        if len(kinds) < 2:
            return []
        listed = " and ".join(sorted(f"{grid.label}{f', {how.label}' if how else ''}" for grid, how in kinds))
        return [f"bitsandbytes has one type and block size per model, not {listed}; use one, or format native"]

    def nbytes(self, module: ModuleSpec, scheme: Scheme, dtype: torch.dtype) -> int:
        """Exact bytes of the module's tensors."""
        grid = scheme.grid
        if int8.holds(grid):
            return other_bytes(module, dtype) + int8.nbytes(module)
        if not isinstance(grid, FloatGrid):
            return plain_bytes(module, dtype)
        rows, columns = module.shape
        scales = rows * grid.groups(columns)
        total = other_bytes(module, dtype) + rows * columns // 2 + 4 * 16 + len(_state(grid, module.shape, dtype, 0.0))
        return total + (scales + 4 * 256 + 4 * -(-scales // BLOCK) if grid.scale == "nested" else 4 * scales)

    def pack(self, module: ModuleSpec, scheme: Scheme, weight: Representation, dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors by full name; removed weights get the code that decodes to zero."""
        quantized = codes_of(weight)
        if quantized is None and scheme.grid is None:
            return plain_weight(module, weight, dtype)
        if quantized is None or quantized.grid != scheme.grid:
            raise FormatError(f"{module.name}: the weight is not what its scheme says ({scheme})")
        if not isinstance(quantized.grid, FloatGrid):
            return int8.pack(module, quantized)
        grid, coded = quantized.grid, quantized.scale_codes
        pairs = quantized.codes.reshape(1, -1, 2).flip(-1).flatten(1)
        tensors = {"": pack_bits(pairs, 4).reshape(-1, 1), ".quant_map": elements(grid.element).clone()}
        offset = 0.0
        if coded is None:
            tensors[".absmax"] = quantized.scale.flatten()
        else:
            offset = float(coded.shared[0])
            tensors |= {".absmax": coded.codes.flatten(), ".nested_absmax": coded.shared[1:].clone()}
            tensors[".nested_quant_map"] = dynamic_map().clone()
        state = bytearray(_state(grid, module.shape, dtype, offset), "utf-8")
        tensors[_state_key(grid)] = torch.frombuffer(state, dtype=torch.uint8)
        return {f"{module.name}.weight{key}": tensor for key, tensor in tensors.items()}

    def unpack(self, module: ModuleSpec, scheme: Scheme, load: Callable[[str], Tensor]) -> Representation:
        """Codes and scales back, without the library; FormatError when the file does not hold what config.json says."""
        grid, shape = scheme.grid, tuple(module.shape)
        if isinstance(grid, IntegerGrid):
            return int8.unpack(module, grid, load)
        if not isinstance(grid, FloatGrid):
            return Dense(read_plain_weight(module, load))
        name = f"{module.name}.weight"
        state = json.loads(bytes(load(name + _state_key(grid)).tolist()))
        told = (grid.element, grid.group_size, list(shape))
        if (state["quant_type"], state["blocksize"], state["shape"]) != told:
            raise FormatError(f"{name} is stored as {state}, but config.json makes it {told}")
        if not torch.equal(load(f"{name}.quant_map"), elements(grid.element)):
            raise FormatError(f"{name}.quant_map is not that of {grid.element}; use a checkpoint of bitsandbytes 0.40+")
        pairs = unpack_bits(load(name).reshape(1, -1), 4, math.prod(shape))
        codes = pairs.reshape(-1, 2).flip(-1).reshape(shape)
        absmax = load(f"{name}.absmax").reshape(shape[0], -1)
        if grid.scale != "nested":
            return Quantized(codes, absmax, None, grid)
        if not torch.equal(load(f"{name}.nested_quant_map"), dynamic_map()):
            raise FormatError(f"{name}.nested_quant_map is not the signed dynamic map")
        shared = torch.cat([torch.tensor([state["nested_offset"]]), load(f"{name}.nested_absmax")])
        coded = ScaleCodes("nested", absmax, shared)
        return Quantized(codes, coded.decode(), None, grid, scale_codes=coded)

    def decode(self, weight: Representation, dtype: torch.dtype) -> Tensor:
        """The matrix (N, K): products in fp32, rounded once."""
        return weight.dense().to(dtype)

    def config(self, schemes: Mapping[ModuleSpec, Scheme], dtype: torch.dtype) -> dict[str, Any]:
        """`quantization_config` of transformers, with the block size besides; empty when nothing is quantised."""
        chosen = {module: scheme for module, scheme in schemes.items() if scheme.grid is not None}
        if not chosen:
            return {}
        if problems := self.conflicts(schemes):
            raise FormatError("; ".join(problems))
        one = next(iter(chosen.values()))
        heads = [] if any(module.kind == "head" for module in chosen) else _HEADS
        left = [module.name for module in schemes if class_of(module) == "Linear" and module not in chosen]
        return {
            "quantization_config": {
                "quant_method": "bitsandbytes",
                **(_four_bit_config(one.grid) if isinstance(one.grid, FloatGrid) else int8.config(one)),
                "llm_int8_skip_modules": list(dict.fromkeys([*left, *heads])),
            }
        }

    def schemes(self, config: dict[str, Any], modules: tuple[ModuleSpec, ...]) -> dict[str, Scheme]:
        """Module name -> scheme of every linear that `quantization_config` does not leave out."""
        told = config["quantization_config"]
        if not told.get("load_in_4bit") and not told.get("load_in_8bit"):
            raise FormatError("config.json says bitsandbytes with neither load_in_4bit nor load_in_8bit")
        scheme = int8.scheme(told) if told.get("load_in_8bit") else Scheme(_four_bit_grid(told))
        skipped = told.get("llm_int8_skip_modules")
        left = {*(_HEADS if skipped is None else skipped)}
        return {
            module.name: scheme
            for module in modules
            if "weight" in module.tensors and class_of(module) == "Linear" and module.name not in left
        }


def _places(module: ModuleSpec) -> list[str]:
    """Why transformers would not look for codes in a module; empty if it would."""
    if class_of(module) == "Linear" and not module.expert:
        return []
    return [f"{module.name}: transformers reads bitsandbytes only in linears of their own; use format native"]


def _four_bit_config(grid: FloatGrid) -> dict[str, Any]:
    return {
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": grid.element,
        "bnb_4bit_use_double_quant": grid.scale == "nested",
        "bnb_4bit_compute_dtype": "float32",
        "bnb_4bit_quant_storage": "uint8",
        "bnb_4bit_blocksize": grid.group_size,
    }


def _four_bit_grid(told: Mapping[str, Any]) -> FloatGrid:
    grid = FloatGrid(told["bnb_4bit_quant_type"], told.get("bnb_4bit_blocksize", 64))
    return replace(grid, scale="nested") if told.get("bnb_4bit_use_double_quant") else grid


@functools.cache
def _require_library() -> None:
    missing = [name for name in ("bitsandbytes", "accelerate") if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingDependency(f"format bitsandbytes needs {' and '.join(missing)}: pip install {' '.join(missing)}")


def _state_key(grid: FloatGrid) -> str:
    return f".quant_state.bitsandbytes__{grid.element}"


def _state(grid: FloatGrid, shape: tuple[int, ...], dtype: torch.dtype, offset: float) -> str:
    """The JSON that goes with a matrix; its length does not depend on the offset."""
    entry: dict[str, Any] = {
        "quant_type": grid.element,
        "blocksize": grid.group_size,
        "dtype": str(dtype).removeprefix("torch."),
        "shape": list(shape),
    }
    if grid.scale != "nested":
        return json.dumps(entry)
    entry |= {"nested_blocksize": BLOCK, "nested_dtype": "float32"}
    length = len(json.dumps(entry | {"nested_offset": 0})) + _NUMBER
    return json.dumps(entry | {"nested_offset": offset}).ljust(length)
