"""The format of vLLM and llm-compressor, loaded by stock transformers with the `compressed-tensors` package.

Two layouts, chosen for each scheme:

    pack-quantized   weight_packed int32 (N, ceil(K * bits / 32)), codes + 2**(bits-1) as a bit stream without gaps per
                     row; weight_scale; weight_zero_point packed along the outputs; weight_shape int64 (2,)
    int-quantized    weight int8 (N, K); weight_scale; weight_zero_point int8. For 8-bit weights with 8-bit inputs

Engines decode as `(code - zero) * scale` in the dtype the model is loaded in, with the scale cast to that dtype first.
The difference needs at most 8 bits and the product of it with a bf16 or fp16 scale fits in fp32, so the result is the
exact product rounded once, which `decode` returns.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from penjing.errors import FormatError, MissingDependency
from penjing.formats.base import codes_of, other_bytes, plain_bytes, plain_weight, read_plain_weight
from penjing.formats.packing import unpack_bits
from penjing.formats.targets import class_of, find_target, summarise
from penjing.models.layout import ModuleSpec
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Dense, Quantized, Representation, Scheme


class Declared(NamedTuple):
    """What a file tells of a quantised weight; how its scale was chosen and which weights were removed, it does not."""

    grid: IntegerGrid
    activations: int | None

    @property
    def layout(self) -> str:
        """int8 tensors only where an engine multiplies integers; everything else is packed to its bit width."""
        return "int-quantized" if self.grid.bits == 8 and self.activations is not None else "pack-quantized"


_LIVE_HEAD = "lm_head"
"""transformers calls the head so even where the checkpoint has another name (GPT-NeoX: embed_out)."""

_FLATTENED = re.compile(r"(^|\.)decoder\.layers\.\d+\.fc[12]$")
"""Linears that get all tokens of a batch as one matrix (OPT). For inputs of two dimensions the loader takes one scale
for the whole matrix, not one per token: results would depend on what else is in the batch."""

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class CompressedTensorsFormat:
    """Integer weights of 2 to 8 bits, optionally with 8-bit inputs, in the layout that vLLM and transformers read."""

    name = "compressed-tensors"
    summary = "integer weights (W2A16 to W8A16, W8A8) for vLLM and plain transformers"

    def problems(self, module: ModuleSpec, scheme: Scheme) -> list[str]:
        """What the loader of compressed-tensors in transformers does not read; raises MissingDependency without it."""
        if scheme.grid is None:
            if scheme.activations is None:
                return []
            return [f"the inputs of {module.name} can be quantised only together with its weight"]
        _require_library()
        return [*_grid_problems(module, scheme.grid), *_module_problems(module, scheme, scheme.grid)]

    def conflicts(self, schemes: Mapping[ModuleSpec, Scheme]) -> list[str]:
        """What transformers decodes only when the whole model has one scheme."""
        groups = _groups(schemes)
        at_load = _decoded_at_load(groups)
        mixed = len(groups) > 1 or any(declared.activations is not None for declared in groups)
        problems = _expert_problems(schemes) if groups else []
        if at_load and mixed:
            problems.append(
                f"transformers reads {at_load} only in a model with one scheme and without `activations`: use one "
                "symmetric scheme and leave the embedding, or use format native"
            )
        return problems

    def nbytes(self, module: ModuleSpec, scheme: Scheme, dtype: torch.dtype) -> int:
        """Exact bytes of the module's tensors."""
        if scheme.grid is None:
            return plain_bytes(module, dtype)
        grid, (rows, columns) = scheme.grid, module.shape
        bits = grid.bits
        one = grid.group_size == "tensor"
        scales = 1 if one else rows * grid.groups(columns)
        total = other_bytes(module, dtype) + scales * grid.scale_dtype.itemsize
        if Declared(grid, scheme.activations).layout == "int-quantized":
            return total + rows * columns + (0 if grid.symmetric else scales)
        total += rows * 4 * -(-columns * bits // 32) + 2 * 8
        if not grid.symmetric:
            total += 1 if one else 4 * -(-rows * bits // 32) * grid.groups(columns)
        return total

    def pack(self, module: ModuleSpec, scheme: Scheme, weight: Representation, dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors by full name; removed weights get the code that decodes to zero."""
        quantized, declared = codes_of(weight), _declared(scheme)
        if quantized is None and declared is None:
            return plain_weight(module, weight, dtype)
        if quantized is None or declared is None or quantized.grid.bits != declared.grid.bits:
            raise FormatError(f"{module.name}: the weight is not what its scheme says ({scheme})")
        if quantized.group_index is not None:
            raise FormatError(f"{module.name}: compressed-tensors has no place for columns grouped out of order")
        one = quantized.grid.group_size == "tensor"
        zero = quantized.zero_point
        tensors = {"weight_scale": quantized.scale[:1, 0] if one else quantized.scale}
        if declared.layout == "int-quantized":
            tensors["weight"] = quantized.codes
            if zero is not None:
                tensors["weight_zero_point"] = zero[:1, 0] if one else zero
        else:
            tensors |= _packed(quantized)
        return {f"{module.name}.{key}": value.contiguous() for key, value in tensors.items()}

    def unpack(self, module: ModuleSpec, scheme: Scheme, load: Callable[[str], Tensor]) -> Representation:
        """Codes, scales and zero points back, without the library."""
        rows, columns = module.shape
        if scheme.grid is None:
            return Dense(read_plain_weight(module, load))
        grid = scheme.grid
        scale = load(f"{module.name}.weight_scale")
        if Declared(grid, scheme.activations).layout == "int-quantized":
            codes = load(f"{module.name}.weight")
        else:
            shape = tuple(load(f"{module.name}.weight_shape").tolist())
            if shape != (rows, columns):
                raise FormatError(f"{module.name}.weight_shape is {shape}, but config.json makes it {(rows, columns)}")
            codes = _signed(load(f"{module.name}.weight_packed"), grid.bits, columns)
        zero = None
        if not grid.symmetric:
            zero = load(f"{module.name}.weight_zero_point")
            if zero.dtype == torch.int32:
                zero = _signed(zero.T, grid.bits, rows).T.contiguous()
        if grid.group_size == "tensor":
            scale = scale.reshape(1, 1).expand(rows, 1).contiguous()
            zero = None if zero is None else zero.reshape(1, 1).expand(rows, 1).contiguous()
        return Quantized(codes, scale, zero, grid)

    def decode(self, weight: Representation, dtype: torch.dtype) -> Tensor:
        """The matrix (N, K) that an engine computes with when it loads the model in `dtype`."""
        quantized = codes_of(weight)
        if quantized is None:
            return weight.dense().to(dtype)
        return replace(quantized, scale=quantized.scale.to(dtype)).dense().to(dtype)

    def config(self, schemes: Mapping[ModuleSpec, Scheme], dtype: torch.dtype) -> dict[str, Any]:
        """`quantization_config`, validated by the library's own schema; empty when nothing is quantised."""
        groups = _groups(schemes)
        if not groups:
            return {}
        if problems := self.conflicts(schemes):
            raise FormatError("; ".join(problems))
        everything = [module.name for module in schemes]
        linears = {module.name for module in schemes if class_of(module) == "Linear"}
        chosen = {module.name for modules in groups.values() for module in modules}
        heads = {module.name for module in schemes if module.kind == "head"} | {_LIVE_HEAD}
        by_class = len(groups) == 1 and bool(linears & chosen)
        config_groups = {}
        for number, (declared, modules) in enumerate(groups.items()):
            names = [module.name for module in modules]
            targets = ["Linear", *(name for name in names if name not in linears)] if by_class else []
            targets = targets or [_findable(target) for target in summarise(names, everything)]
            targets += [_LIVE_HEAD] if not by_class and heads.intersection(names) - {_LIVE_HEAD} else []
            config_groups[f"group_{number}"] = _scheme_entry(declared, targets)
        ignored = summarise(sorted(linears - chosen - heads), everything) if by_class else []
        ignored += [] if heads & chosen else sorted(heads)
        entry = _validated(config_groups, ignored)
        return {"quantization_config": entry | ({"dequantize": True} if _decoded_at_load(groups) else {})}

    def schemes(self, config: dict[str, Any], modules: tuple[ModuleSpec, ...]) -> dict[str, Scheme]:
        """Module name -> scheme of every module that `quantization_config` quantises."""
        declared = config["quantization_config"]
        dtype = _DTYPES[str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")]
        by_target = {
            target: _read_scheme(name, group, declared, dtype)
            for name, group in declared["config_groups"].items()
            for target in group["targets"]
        }
        found = {}
        for module in modules:
            if "weight" not in module.tensors or find_target(module, declared.get("ignore") or []):
                continue
            target = find_target(module, list(by_target))
            if target is not None and not module.transposed:
                found[module.name] = by_target[target]
        return found


@functools.cache
def _require_library() -> None:
    if importlib.util.find_spec("compressed_tensors") is None:
        raise MissingDependency("format compressed-tensors needs a package: pip install compressed-tensors")


def _declared(scheme: Scheme) -> Declared | None:
    """What the file will tell of a scheme; None when the weight stays dense."""
    if scheme.grid is None:
        return None
    grid = scheme.grid
    return Declared(
        IntegerGrid(grid.bits, grid.group_size, grid.symmetric, scale_dtype=grid.scale_dtype), scheme.activations
    )


def _grid_problems(module: ModuleSpec, grid: IntegerGrid) -> list[str]:
    columns, size = module.shape[1], grid.group_size
    if not isinstance(size, int) or columns % size == 0:
        return []
    divisors = (width for width in range(16, columns + 1) if columns % width == 0)
    fits = sorted(divisors, key=lambda width: abs(math.log(width / size)))
    listed = ", ".join(str(width) for width in sorted(fits[:3]))
    return [
        f"group_size {size} does not divide the {columns} inputs of {module.name}; {listed} do; "
        "or use format native, which stores a shorter last group"
    ]


def _module_problems(module: ModuleSpec, scheme: Scheme, grid: IntegerGrid) -> list[str]:
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
    if ".experts." in name and (scheme.activations is not None or not grid.symmetric):
        problems.append(
            f"{name}: transformers reads experts only with symmetric weights and without `activations`; "
            "use `symmetric: true` and no `activations`, or format native for zero points"
        )
    if scheme.activations is not None and _FLATTENED.search(name):
        problems.append(
            f"{name}: OPT flattens the batch before it, and transformers would quantise all its tokens with one scale; "
            "ignore fc1 and fc2, or use format native"
        )
    if scheme.activations is not None and module.kind == "embedding":
        problems.append(f"{name}: the input of an embedding is a token number; drop `activations`")
    return problems


def _groups(schemes: Mapping[ModuleSpec, Scheme]) -> dict[Declared, list[ModuleSpec]]:
    """Modules by what a file tells of them."""
    groups: dict[Declared, list[ModuleSpec]] = {}
    for module, scheme in schemes.items():
        if declared := _declared(scheme):
            groups.setdefault(declared, []).append(module)
    return groups


def _decoded_at_load(groups: Mapping[Declared, list[ModuleSpec]]) -> str:
    """What needs `dequantize: true`, for people; empty when nothing does.

    Without it the loader leaves modules packed until the first forward pass, and for that makes empty packed tensors
    first: those it makes for zero points have the shape from before packing, and an embedding without `weight` fails.
    """
    for declared, modules in groups.items():
        if any(module.kind == "embedding" for module in modules):
            return "a quantised embedding"
        grid = declared.grid
        if not grid.symmetric and grid.group_size != "tensor" and declared.layout == "pack-quantized":
            return "packed zero points"
    return ""


def _expert_problems(schemes: Mapping[ModuleSpec, Scheme]) -> list[str]:
    """transformers fuses the experts, and decodes all experts of a model, or none, with one scheme."""
    holding = {
        replace(scheme, sparsity=0.0, pattern=None) for module, scheme in schemes.items() if ".experts." in module.name
    }
    if not holding or (len(holding) == 1 and holding.pop().grid is not None):
        return []
    return [
        "a model with experts loads in transformers only if all its experts are quantised, with one scheme; "
        "target all experts in one step, or use format native"
    ]


def _packed(quantized: Quantized) -> dict[str, Tensor]:
    _require_library()
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    bits, zero = quantized.grid.bits, quantized.zero_point
    tensors = {
        "weight_packed": pack_to_int32(quantized.codes, bits),
        "weight_shape": torch.tensor(quantized.codes.shape),
    }
    if zero is not None:
        one = quantized.grid.group_size == "tensor"
        tensors["weight_zero_point"] = zero[:1, 0] if one else pack_to_int32(zero, bits, packed_dim=0)
    return tensors


def _signed(words: Tensor, bits: int, count: int) -> Tensor:
    """Words (R, n) int32 of a bit stream -> signed codes (R, count) int8."""
    codes = unpack_bits(words.contiguous().view(torch.uint8), bits, count)
    return (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def _findable(target: str) -> str:
    """transformers finds the scheme of the experts by the first expression that says "experts"."""
    return f"re:{re.escape(target)}$" if ".experts." in target and not target.startswith("re:") else target


def _scheme_entry(declared: Declared, targets: list[str]) -> dict[str, Any]:
    size = declared.grid.group_size
    strategy = "group" if isinstance(size, int) else size or "channel"
    entry: dict[str, Any] = {
        "targets": targets,
        "weights": {
            "num_bits": declared.grid.bits,
            "type": "int",
            "symmetric": declared.grid.symmetric,
            "strategy": strategy,
            "group_size": size if strategy == "group" else None,
        },
        "format": declared.layout,
    }
    if declared.activations is not None:
        entry["input_activations"] = {
            "num_bits": declared.activations,
            "type": "int",
            "symmetric": True,
            "strategy": "token",
            "dynamic": True,
        }
    return entry


def _validated(config_groups: dict[str, Any], ignored: list[str]) -> dict[str, Any]:
    _require_library()
    from compressed_tensors.quantization import QuantizationConfig

    layouts = {group["format"] for group in config_groups.values()}
    config = QuantizationConfig(
        config_groups=config_groups,
        format=layouts.pop() if len(layouts) == 1 else "mixed-precision",
        quantization_status="compressed",
        ignore=ignored,
    )
    return config.model_dump(mode="json")


def _read_scheme(name: str, group: Mapping[str, Any], config: Mapping[str, Any], dtype: torch.dtype) -> Scheme:
    weights, inputs = group.get("weights"), group.get("input_activations")
    if not weights or weights["type"] != "int" or weights["strategy"] not in ("group", "channel", "tensor"):
        raise FormatError(f"quantization_config {name}: only integer weights per group, channel or tensor can be read")
    size = {"channel": None, "tensor": "tensor"}.get(weights["strategy"], weights.get("group_size"))
    grid = IntegerGrid(weights["num_bits"], size, weights["symmetric"], scale_dtype=dtype)
    activations = inputs["num_bits"] if inputs else None
    layout = group.get("format") or config.get("format")
    if layout != Declared(grid, activations).layout:
        raise FormatError(f"quantization_config {name}: layout {layout} with {weights['num_bits']} bits cannot be read")
    return Scheme(grid=grid, activations=activations)
