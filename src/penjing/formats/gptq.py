"""Checkpoints of GPTQ's own layout, which AutoGPTQ began and GPTQModel, transformers, vLLM and SGLang read.

Per weight (N outputs, K inputs, G groups), by name after the module's; codes are unsigned, code + 2**(bits-1):

    qweight  int32 (K * bits / 32, N): the codes of an output as one stream of bits, lowest first, down its column
    qzeros   int32 (G, N * bits / 32): zero points of a group as such a stream along the outputs
    scales   (G, N)
    g_idx    int32 (K,): the group of every input

Weights are `scale * (code - zero)`. Version 1 stores each zero point minus one. It cannot say 0, which would carry into
its neighbour when a reader adds the one back to whole words, so it is written for symmetric grids only, whose zero
points are all 2**(bits-1): every engine reads that. Version 2 stores zero points as they are.

Example, 4 bits: the codes -8, -7, ..., -1 of eight inputs become 0, 1, ..., 7 and make the word 0x76543210; eight zero
points of a symmetric grid make 0x77777777 in version 1 and 0x88888888 in version 2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from penjing.errors import FormatError
from penjing.formats import words
from penjing.formats.base import codes_of, other_bytes, plain_bytes, plain_weight, read_plain_weight
from penjing.models.layout import ModuleSpec
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Dense, Quantized, Representation, Scheme

_WIDTHS = (2, 3, 4, 8)


class GPTQFormat:
    """Linears of the blocks as integer codes of one width and group size; everything else stays plain."""

    multiplies_integers = False

    def __init__(self, version: int) -> None:
        self.version = version
        self.name = "gptq" if version == 1 else "gptq-v2"
        zeros = "symmetric" if version == 1 else "any zero point"
        self.summary = f"GPTQ checkpoints of 2, 3, 4 and 8 bits, {zeros}, for vLLM, SGLang and GPTQModel"

    def problems(self, module: ModuleSpec, scheme: Scheme) -> list[str]:
        """What the layout has no place for."""
        found = words.problems(self.name, module, scheme, _WIDTHS)
        if isinstance(scheme.grid, IntegerGrid) and not scheme.grid.symmetric and self.version == 1:
            found.append(
                f"{module.name}: version 1 of the layout cannot store a zero point of 0; use format gptq-v2, or "
                "`symmetric: true`"
            )
        return found

    def conflicts(self, schemes: Mapping[ModuleSpec, Scheme]) -> list[str]:
        """config.json tells of one grid, and names linears as they are called in every block."""
        chosen = {_local(module) for module in words.quantised(schemes)}
        found = words.conflicts(self.name, schemes)
        for module in words.linears_of_blocks(schemes):
            if _local(module) in chosen and schemes[module].grid is None:
                found.append(
                    f"{module.name} stays dense while the same linear of another block does not; format {self.name} "
                    "has one list for all blocks: treat them alike, or use format native or compressed-tensors"
                )
        return found

    def nbytes(self, module: ModuleSpec, scheme: Scheme, dtype: torch.dtype) -> int:
        """Exact bytes of the module's tensors."""
        grid = scheme.grid
        if not isinstance(grid, IntegerGrid):
            return plain_bytes(module, dtype)
        rows, columns = module.shape
        groups = grid.groups(columns)
        coded = (columns + groups) * rows * grid.bits // 8
        return other_bytes(module, dtype) + coded + groups * rows * grid.scale_dtype.itemsize + 4 * columns

    def pack(self, module: ModuleSpec, scheme: Scheme, weight: Representation, dtype: torch.dtype) -> dict[str, Tensor]:
        """Tensors by full name; removed weights get the code that decodes to zero."""
        quantized = codes_of(weight)
        if quantized is None and scheme.grid is None:
            return plain_weight(module, weight, dtype)
        if quantized is None or not isinstance(quantized.grid, IntegerGrid) or quantized.grid != scheme.grid:
            raise FormatError(f"{module.name}: the weight is not what its scheme says ({scheme})")
        grid, zero, index = quantized.grid, quantized.zero_point, quantized.group_index
        zero = torch.zeros(quantized.scale.shape, dtype=torch.int8) if zero is None else zero
        tensors = {
            "qweight": words.to_words(quantized.codes, words.middle(grid), grid.bits).T,
            "qzeros": words.to_words(zero.T, words.middle(grid) - self._less, grid.bits),
            "scales": quantized.scale.T,
            "g_idx": _in_order(module, grid) if index is None else index,
        }
        return {f"{module.name}.{key}": tensor.contiguous() for key, tensor in tensors.items()}

    @property
    def _less(self) -> int:
        """What stored zero points are too small by."""
        return 1 if self.version == 1 else 0

    def unpack(self, module: ModuleSpec, scheme: Scheme, load: Callable[[str], Tensor]) -> Representation:
        """Codes, scales and zero points back; FormatError when the file does not hold what config.json says."""
        grid = scheme.grid
        if not isinstance(grid, IntegerGrid):
            return Dense(read_plain_weight(module, load))
        (rows, columns), groups = module.shape, grid.groups(module.shape[1])
        shapes = {
            "qweight": (columns * grid.bits // words.WORD, rows),
            "qzeros": (groups, rows * grid.bits // words.WORD),
            "scales": (groups, rows),
            "g_idx": (columns,),
        }
        stored = words.load_all(module, shapes, load)
        codes = words.from_words(stored["qweight"].T, words.middle(grid), grid.bits, columns)
        zero = words.from_words(stored["qzeros"], words.middle(grid), grid.bits, rows).T.contiguous()
        if self._less:
            zero = torch.where(zero == grid.high, grid.low, zero + 1).to(torch.int8)
        if grid.symmetric and bool(zero.any()):
            raise FormatError(
                f"{module.name}.qzeros differ from {words.middle(grid)}, but config.json says `sym`: true"
            )
        index = self._read_index(module, scheme, grid, stored["g_idx"])
        return Quantized(codes, stored["scales"].T.contiguous(), None if grid.symmetric else zero, grid, index)

    def _read_index(self, module: ModuleSpec, scheme: Scheme, grid: IntegerGrid, index: Tensor) -> Tensor | None:
        """The stored groups (K,) where they are not those of consecutive inputs."""
        if torch.equal(index, _in_order(module, grid)):
            return None
        if not scheme.ordered:
            raise FormatError(f"{module.name}.g_idx scatters groups, but config.json says `desc_act`: false")
        if bool(((index < 0) | (index >= grid.groups(len(index)))).any()):
            raise FormatError(f"{module.name}.g_idx names groups that do not exist; the checkpoint is damaged")
        return index

    def decode(self, weight: Representation, dtype: torch.dtype) -> Tensor:
        """The matrix (N, K): scales in `dtype`, exact products rounded once."""
        return words.decode(weight, dtype)

    def config(self, schemes: Mapping[ModuleSpec, Scheme], dtype: torch.dtype) -> dict[str, Any]:
        """`quantization_config` as GPTQModel writes it; empty when nothing is quantised."""
        grid = words.one_grid(self.name, schemes)
        if grid is None:
            return {}
        chosen = dict.fromkeys(_local(module) for module in words.quantised(schemes))
        left = dict.fromkeys(_local(module) for module in words.linears_of_blocks(schemes))
        left = {name: None for name in left if name not in chosen}
        told: dict[str, Any] = {
            "quant_method": "gptq",
            "checkpoint_format": "gptq" if self.version == 1 else "gptq_v2",
            "bits": grid.bits,
            "group_size": grid.group_size or -1,
            "sym": grid.symmetric,
            "desc_act": any(scheme.ordered for scheme in schemes.values()),
            "lm_head": False,
            "pack_dtype": "int32",
            "meta": {"quantizer": ["penjing"]},
        }
        if left:
            told["modules_in_block_to_quantize"] = [[name] for name in chosen]
            told["dynamic"] = {rf"-:.*\.{re.escape(name)}$": {} for name in left}
        return {"quantization_config": told}

    def schemes(self, config: dict[str, Any], modules: tuple[ModuleSpec, ...]) -> dict[str, Scheme]:
        """Module name -> scheme of every linear of the blocks that `quantization_config` does not leave out."""
        told = config["quantization_config"]
        rules = told.get("dynamic") or {}
        if told.get("lm_head") or any(not rule.startswith("-:") for rule in rules):
            raise FormatError("config.json has a quantised head or other bits for some linears; penjing reads neither")
        grid = words.read_grid(config, told["bits"], told.get("group_size", -1), told.get("sym", True))
        scheme = Scheme(grid, ordered=bool(told.get("desc_act")) and grid.group_size is not None)
        listed = set(_flat(told.get("modules_in_block_to_quantize") or []))
        return {
            module.name: scheme
            for module in words.linears_of_blocks(modules)
            if (not listed or _local(module) in listed)
            and not any(re.match(rule.removeprefix("-:"), module.name) for rule in rules)
        }


def _in_order(module: ModuleSpec, grid: IntegerGrid) -> Tensor:
    """The group (K,) of every input where groups are consecutive inputs."""
    columns = module.shape[1]
    return (torch.arange(columns) // grid.columns_per_group(columns)).int()


def _local(module: ModuleSpec) -> str:
    """The name of a linear inside its block: what follows the first number."""
    return re.split(r"\.\d+\.", module.name, maxsplit=1)[-1]


def _flat(names: Iterable[Any]) -> list[str]:
    return [leaf for name in names for leaf in ([name] if isinstance(name, str) else _flat(name))]
