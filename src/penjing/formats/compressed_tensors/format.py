"""The format itself: what it holds, how a matrix is written and read, what config.json says."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from penjing.errors import FormatError
from penjing.formats.base import codes_of, input_bytes, other_bytes, plain_bytes, plain_weight, read_plain_weight
from penjing.formats.compressed_tensors.problems import decoded_at_load, expert_problems, grid_problems, module_problems
from penjing.formats.compressed_tensors.schema import Declared, declared, entry, read_entry, require_library, validated
from penjing.formats.targets import class_of, find_target, summarise
from penjing.models.layout import ModuleSpec
from penjing.numerics.float_grids import FloatGrid
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Dense, Representation, Scheme

_LIVE_HEAD = "lm_head"
"""transformers calls the head so even where the checkpoint has another name (GPT-NeoX: embed_out)."""

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class CompressedTensorsFormat:
    """Integers of 2 to 8 bits and floats of 4 and 8, with or without quantised inputs, as vLLM reads them."""

    name = "compressed-tensors"
    summary = "integer weights (W2A16 to W8A16, W8A8), FP8, MXFP8, MXFP4, NVFP4 for vLLM and plain transformers"
    multiplies_integers = False

    def problems(self, module: ModuleSpec, scheme: Scheme) -> list[str]:
        """What the loader of compressed-tensors in transformers does not read; raises MissingDependency without it."""
        grid = scheme.grid
        if scheme.rank or scheme.correction or scheme.train:
            return [f"{module.name}: neither factors nor tensor trains have a place there; use format native"]
        if grid is None:
            if scheme.activations is None:
                return []
            return [f"the inputs of {module.name} can be quantised only together with its weight"]
        if not isinstance(grid, IntegerGrid | FloatGrid) or scheme.columns or scheme.outliers:
            return [f"{module.name}: only codes on one integer or float grid can be written; use format native"]
        require_library()
        return [*grid_problems(module, grid), *module_problems(module, scheme, grid)]

    def conflicts(self, schemes: Mapping[ModuleSpec, Scheme]) -> list[str]:
        """What transformers decodes only when the whole model has one scheme."""
        groups = _groups(schemes)
        at_load = decoded_at_load(groups)
        mixed = len(groups) > 1 or any(told.activations is not None for told in groups)
        problems = expert_problems(schemes) if groups else []
        if at_load and mixed:
            problems.append(
                f"transformers reads {at_load} only in a model with one scheme and without `activations`: use one "
                "symmetric scheme and leave the embedding, or use format native"
            )
        return problems

    def nbytes(self, module: ModuleSpec, scheme: Scheme, dtype: torch.dtype) -> int:
        """Exact bytes of the module's tensors."""
        told = declared(scheme)
        if told is None:
            return plain_bytes(module, dtype)
        return other_bytes(module, dtype) + input_bytes(scheme) + told.layout.nbytes(module.shape, told.grid)

    def pack(self, module: ModuleSpec, scheme: Scheme, weight: Representation, dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors by full name; removed weights get the code that decodes to zero."""
        quantized, told = codes_of(weight), declared(scheme)
        if quantized is None and told is None:
            return plain_weight(module, weight, dtype)
        if quantized is None or told is None or quantized.grid.bits != told.grid.bits:
            raise FormatError(f"{module.name}: the weight is not what its scheme says ({scheme})")
        if quantized.group_index is not None:
            raise FormatError(f"{module.name}: compressed-tensors has no place for columns grouped out of order")
        require_library()
        tensors = told.layout.write(quantized)
        return {f"{module.name}.{key}": value.contiguous() for key, value in tensors.items()}

    def unpack(self, module: ModuleSpec, scheme: Scheme, load: Callable[[str], Tensor]) -> Representation:
        """Codes, scales and zero points back, without the library."""
        told = declared(scheme)
        if told is None:
            return Dense(read_plain_weight(module, load))
        rows, columns = module.shape
        try:
            return told.layout.read(lambda key: load(f"{module.name}.{key}"), (rows, columns), told.grid)
        except FormatError as error:
            raise FormatError(f"{module.name}: {error}") from error

    def decode(self, weight: Representation, dtype: torch.dtype) -> Tensor:
        """The matrix (N, K) that an engine computes with when it loads the model in `dtype`."""
        quantized = codes_of(weight)
        if quantized is None:
            return weight.dense().to(dtype)
        return Declared(quantized.grid, None).layout.decode(quantized, dtype)

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
        for number, (told, modules) in enumerate(groups.items()):
            names = [module.name for module in modules]
            targets = ["Linear", *(name for name in names if name not in linears)] if by_class else []
            targets = targets or [_findable(target) for target in summarise(names, everything)]
            targets += [_LIVE_HEAD] if not by_class and heads.intersection(names) - {_LIVE_HEAD} else []
            config_groups[f"group_{number}"] = entry(told, targets)
        ignored = summarise(sorted(linears - chosen - heads), everything) if by_class else []
        ignored += [] if heads & chosen else sorted(heads)
        written = validated(config_groups, ignored)
        return {"quantization_config": written | ({"dequantize": True} if decoded_at_load(groups) else {})}

    def schemes(self, config: dict[str, Any], modules: tuple[ModuleSpec, ...]) -> dict[str, Scheme]:
        """Module name -> scheme of every module that `quantization_config` quantises."""
        stored = config["quantization_config"]
        dtype = _DTYPES[str(config.get("dtype") or config.get("torch_dtype") or "bfloat16").removeprefix("torch.")]
        by_target = {
            target: read_entry(name, group, stored, dtype)
            for name, group in stored["config_groups"].items()
            for target in group["targets"]
        }
        found = {}
        for module in modules:
            if "weight" not in module.tensors or find_target(module, stored.get("ignore") or []):
                continue
            target = find_target(module, list(by_target))
            if target is not None and not module.transposed:
                found[module.name] = by_target[target]
        return found


def _groups(schemes: Mapping[ModuleSpec, Scheme]) -> dict[Declared, list[ModuleSpec]]:
    """Modules by what a file tells of them."""
    groups: dict[Declared, list[ModuleSpec]] = {}
    for module, scheme in schemes.items():
        if told := declared(scheme):
            groups.setdefault(told, []).append(module)
    return groups


def _findable(target: str) -> str:
    """transformers finds the scheme of the experts by the first expression that says "experts"."""
    return f"re:{re.escape(target)}$" if ".experts." in target and not target.startswith("re:") else target
