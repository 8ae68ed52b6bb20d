"""One table of cases: what is written, and into which format. Shared by the tests of formats."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from penjing.formats import FORMATS
from penjing.methods.quantization.rtn import rtn
from penjing.models import layout_of
from penjing.models.layout import ModuleSpec
from penjing.numerics.float_grids import FloatGrid, ScaledGrid
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Activations, Dense, Masked, Quantized, Representation, Scheme

Pick = Callable[[ModuleSpec], Scheme | None]


def grid(bits: int, size: int | str | None = 16, symmetric: bool = True, rule: str = "full") -> IntegerGrid:
    """Scales in fp32, as the tiny models are."""
    return IntegerGrid(bits, size, symmetric, rule, torch.float32)


FLOATS: dict[str, FloatGrid] = {
    "nf4": FloatGrid("nf4", 32),
    "nf4 double-quantised": FloatGrid("nf4", 32, "nested"),
    "fp4": FloatGrid("fp4", 32),
    "fp8": FloatGrid("e4m3", None),
    "fp8 tensor": FloatGrid("e4m3", "tensor"),
    "fp8 e5m2": FloatGrid("e5m2", None),
    "fp8 block": FloatGrid("e4m3", 32, tile_rows=32),
    "mxfp4": FloatGrid("e2m1", 32, "e8m0"),
    "mxfp8": FloatGrid("e4m3", 32, "e8m0"),
    "nvfp4": FloatGrid("e2m1", 16, "e4m3"),
}


def float_zero(bits: int, size: int | str | None = 16) -> IntegerGrid:
    """Zero points of any value, as HQQ has them."""
    return IntegerGrid(bits, size, False, scale_dtype=torch.float32, zero="float")


def compress(weight: Tensor, scheme: Scheme, dtype: torch.dtype = torch.float32, seed: int = 0) -> Representation:
    """Prune by magnitude and round to nearest, as simply as can be."""
    kept = None
    if scheme.pattern is not None:
        zeros, of = scheme.pattern
        groups = weight.abs().reshape(weight.shape[0], -1, of)
        kept = torch.ones_like(groups, dtype=torch.bool).scatter_(-1, groups.argsort(-1)[..., :zeros], False)
        kept = kept.reshape(weight.shape)
    elif scheme.sparsity:
        dropped = weight.abs().flatten().argsort()[: round(weight.numel() * scheme.sparsity)]
        kept = torch.ones(weight.numel(), dtype=torch.bool).index_fill_(0, dropped, False).reshape(weight.shape)
    values: Dense | Quantized = Dense(weight.to(dtype))
    if scheme.grid is not None:
        values = quantise(weight if kept is None else weight * kept, scheme.grid, scheme.ordered, seed)
    return values if kept is None else Masked(values, kept)


def quantise(weight: Tensor, on: ScaledGrid, ordered: bool = False, seed: int = 0) -> Quantized:
    """Codes of the nearest values; `ordered` shuffles the columns before they are grouped."""
    if isinstance(on, FloatGrid):
        return rtn(weight, on)
    columns = weight.shape[1]
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(seed)) if ordered else torch.arange(columns)
    scale, zero = on.fit_rows(weight[:, order])
    codes = on.encode(weight[:, order].float(), on.spread(scale, columns), on.spread(zero, columns))
    index = None
    if ordered:
        index = torch.empty(columns, dtype=torch.int32)
        index[order] = (torch.arange(columns) // on.columns_per_group(columns)).to(torch.int32)
    stored = torch.empty_like(codes)
    stored[:, order] = codes
    zero_point = None if on.symmetric else zero.to(on.zero_dtype)
    return Quantized(stored.to(torch.int8), scale.to(on.scale_dtype), zero_point, on, index)


@dataclass(frozen=True)
class Case:
    """One model written in one format."""

    format: str
    family: str
    pick: Pick
    tied: bool = False


def linear(scheme: Scheme) -> Pick:
    return lambda module: scheme if module.kind == "linear" else None


def matrices(scheme: Scheme) -> Pick:
    return lambda module: scheme if module.kind in ("linear", "embedding", "head") else None


def of_kind(schemes: Mapping[str, Scheme]) -> Pick:
    return lambda module: schemes.get(module.kind)


def by_part(schemes: Mapping[str, Scheme]) -> Pick:
    """The first scheme whose key occurs in the name of a linear."""
    return lambda module: next(
        (scheme for part, scheme in schemes.items() if module.kind == "linear" and part in module.name), None
    )


def _compressed_tensors() -> dict[str, Case]:
    def case(pick: Pick, family: str = "llama", tied: bool = False) -> Case:
        return Case("compressed-tensors", family, pick, tied)

    w8a8 = Scheme(grid(8, None), activations=Activations())
    fp8 = Activations(kind="float")
    cases = {f"{bits} bits": case(linear(Scheme(grid(bits)))) for bits in range(2, 9)}
    cases |= {f"{bits} bits asymmetric": case(linear(Scheme(grid(bits, 32, False)))) for bits in (2, 3, 4, 8)}
    return cases | {
        "channel": case(linear(Scheme(grid(4, None)))),
        "channel asymmetric": case(linear(Scheme(grid(4, None, False)))),
        "tensor": case(linear(Scheme(grid(4, "tensor")))),
        "tensor asymmetric": case(linear(Scheme(grid(4, "tensor", False)))),
        "signed-max": case(linear(Scheme(grid(4, 32, True, "signed-max")))),
        "odd width": case(linear(Scheme(grid(3, 8))), "phi3"),
        "sparse codes": case(linear(Scheme(grid(4, 16, False), sparsity=0.4))),
        "sparse values": case(linear(Scheme(sparsity=0.4))),
        "2:4 codes": case(linear(Scheme(grid(4), 0.5, (2, 4)))),
        "w8a8": case(linear(w8a8)),
        "w8a8 asymmetric": case(linear(Scheme(grid(8, None, False), activations=Activations()))),
        "w8a8 tensor": case(linear(Scheme(grid(8, "tensor"), activations=Activations()))),
        "w4a8": case(linear(Scheme(grid(4), activations=Activations()))),
        "mixed": case(by_part({"mlp": w8a8, "q_proj": Scheme(grid(3)), "layers.0": Scheme(grid(5, 32))})),
        "head": case(of_kind({"linear": Scheme(grid(4)), "head": Scheme(grid(8, None))})),
        "tied, linears only": case(linear(Scheme(grid(4))), tied=True),
        "embedding and head": case(matrices(Scheme(grid(4)))),
        "tied embedding": case(matrices(Scheme(grid(4, 32, False))), tied=True),
        "embedding only": case(of_kind({"embedding": Scheme(grid(8, None))}), tied=True),
        "biases": case(linear(Scheme(grid(4))), "qwen2"),
        "opt": case(linear(Scheme(grid(4))), "opt"),
        "opt w8a8": case(by_part({"self_attn": w8a8}), "opt"),
        "gpt_neox": case(linear(Scheme(grid(4))), "gpt_neox"),
        "gpt_neox head": case(of_kind({"linear": Scheme(grid(4)), "head": Scheme(grid(8, None))}), "gpt_neox"),
        "gemma3": case(linear(Scheme(grid(4))), "gemma3", tied=True),
        "experts": case(linear(Scheme(grid(4))), "qwen3_moe"),
        "experts mixed": case(by_part({"experts": Scheme(grid(3)), "self_attn": Scheme(grid(8, None))}), "mixtral"),
        "experts only": case(by_part({"experts": Scheme(grid(3))}), "mixtral"),
        **{
            name: case(linear(Scheme(FLOATS[name])))
            for name in ("fp8", "fp8 tensor", "fp8 block", "mxfp4", "mxfp8", "nvfp4")
        },
        "fp8 inputs": case(linear(Scheme(FLOATS["fp8"], activations=fp8))),
        "int4, fp8 inputs": case(linear(Scheme(grid(4), activations=fp8))),
        "fp8 experts": case(linear(Scheme(FLOATS["fp8"])), "qwen3_moe"),
        "mxfp4 embedding": case(matrices(Scheme(FLOATS["mxfp4"])), tied=True),
        "nvfp4 sparse codes": case(linear(Scheme(FLOATS["nvfp4"], sparsity=0.4))),
    }


def _bitsandbytes() -> dict[str, Case]:
    def case(pick: Pick, family: str = "llama", tied: bool = False) -> Case:
        return Case("bitsandbytes", family, pick, tied)

    nested = Scheme(FLOATS["nf4 double-quantised"])
    return {
        **{name: case(linear(Scheme(FLOATS[name]))) for name in ("nf4", "nf4 double-quantised", "fp4")},
        "head, biases": case(of_kind({"linear": nested, "head": nested}), "gpt_neox"),
        "tied": case(linear(nested), "gemma3", tied=True),
        "sparse codes": case(linear(replace(nested, sparsity=0.4))),
        "attention beside experts": case(by_part({"self_attn": nested}), "mixtral"),
    }


def _native() -> dict[str, Case]:
    def case(pick: Pick, family: str = "llama", tied: bool = False) -> Case:
        return Case("native", family, pick, tied)

    cases = {f"{bits} bits": case(matrices(Scheme(grid(bits, 20, bits % 2 == 0)))) for bits in range(2, 9)}
    return cases | {
        "tensor asymmetric": case(linear(Scheme(grid(4, "tensor", False)))),
        "signed-max": case(linear(Scheme(grid(4, None, True, "signed-max")))),
        "ordered": case(linear(Scheme(grid(4, 24, False), ordered=True))),
        "float zero": case(linear(Scheme(float_zero(4, 24)))),
        "float zero, sparse, ordered": case(linear(Scheme(float_zero(3, 20), 0.4, ordered=True)), "gpt2", True),
        "float zero, tensor": case(linear(Scheme(float_zero(3, "tensor")))),
        "sparse values": case(linear(Scheme(sparsity=0.37))),
        "sparse codes": case(linear(Scheme(grid(3, 16, False), sparsity=0.37))),
        "2:4 codes": case(linear(Scheme(grid(3), 0.5, (2, 4)))),
        "sparse ordered": case(linear(Scheme(grid(5, 24, False), sparsity=0.5, ordered=True))),
        "tied embedding": case(
            of_kind({"linear": Scheme(grid(4, 48)), "embedding": Scheme(grid(5, 24, False))}), tied=True
        ),
        "w8a8": case(linear(Scheme(grid(8, None), activations=Activations()))),
        "w3a8": case(linear(Scheme(grid(3, 20), activations=Activations()))),
        "only inputs": case(linear(Scheme(activations=Activations()))),
        "gpt2": case(of_kind({"linear": Scheme(grid(4, 24)), "embedding": Scheme(grid(8))}), "gpt2", tied=True),
        "opt w8a8": case(linear(Scheme(grid(8, None), activations=Activations())), "opt"),
        "gpt2 w8a8": case(linear(Scheme(grid(8, None), activations=Activations())), "gpt2", tied=True),
        "phi3": case(linear(Scheme(grid(2, 24))), "phi3"),
        "experts asymmetric": case(linear(Scheme(grid(4, 24, False))), "qwen3_moe"),
        "experts of one block": case(by_part({"0.block_sparse_moe.experts": Scheme(grid(3), 0.5)}), "mixtral"),
        "attention beside experts": case(by_part({"self_attn": Scheme(grid(3))}), "mixtral"),
        "mixed": case(by_part({"mlp": Scheme(sparsity=0.5), "q_proj": Scheme(grid(3)), "v_proj": Scheme(grid(5))})),
        **{name: case(matrices(Scheme(on)), "gpt2", tied=True) for name, on in FLOATS.items()},
        "nf4, groups of 40": case(linear(Scheme(replace(FLOATS["nf4 double-quantised"], group_size=40)))),
        "nvfp4 experts": case(linear(Scheme(FLOATS["nvfp4"])), "mixtral"),
        "mxfp4 sparse codes": case(linear(Scheme(FLOATS["mxfp4"], sparsity=0.37))),
    }


CASES: dict[str, Case] = {
    **{f"compressed-tensors, {name}": case for name, case in _compressed_tensors().items()},
    **{f"bitsandbytes, {name}": case for name, case in _bitsandbytes().items()},
    **{f"native, {name}": case for name, case in _native().items()},
    "dense, fake-quantised": Case("dense", "llama", matrices(Scheme(grid(3)))),
    "dense, gpt2": Case("dense", "gpt2", linear(Scheme(sparsity=0.5)), True),
}


@dataclass(frozen=True)
class Written:
    """A directory as the format wrote it, and the same weights as plain tensors."""

    case: Case
    directory: Path
    decoded: Path
    config: dict[str, Any]
    schemes: dict[ModuleSpec, Scheme]
    weights: dict[str, Representation]


def write(case: Case, source: Path, directory: Path) -> Written:
    """Write a case, and beside it the decoded weights as a plain model."""
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    target = FORMATS[case.format]
    modules = [module for module in layout_of(config).modules if module.tensors]
    schemes = {module: _scheme(case.pick, module) for module in modules}
    packed, plain, weights = dict(tensors), dict(tensors), {}
    for module, scheme in schemes.items():
        if scheme.dense:
            continue
        stored = tensors[f"{module.name}.weight"]
        weight = compress(stored.T if module.transposed else stored, scheme)
        weights[module.name] = weight
        del packed[f"{module.name}.weight"]
        written = target.pack(module, scheme, weight, torch.float32)
        others = sum(value.nbytes for name, value in tensors.items() if name in module.tensor_names()[1:])
        assert sum(value.nbytes for value in written.values()) + others == target.nbytes(module, scheme, torch.float32)
        packed |= written
        decoded = target.decode(weight, torch.float32)
        plain[f"{module.name}.weight"] = (decoded.T if module.transposed else decoded).contiguous()
    for folder, contents in ((directory / "packed", packed), (directory / "decoded", plain)):
        folder.mkdir(parents=True)
        save_file(contents, folder / "model.safetensors", {"format": "pt"})
    shutil.copy(source / "config.json", directory / "decoded")
    config |= target.config(schemes, torch.float32)
    (directory / "packed" / "config.json").write_text(json.dumps(config))
    return Written(case, directory / "packed", directory / "decoded", config, schemes, weights)


def _scheme(pick: Pick, module: ModuleSpec) -> Scheme:
    scheme = (pick(module) or Scheme()) if "weight" in module.tensors else Scheme()
    fits = scheme.pattern is None or module.shape[1] % scheme.pattern[1] == 0
    return scheme if fits else replace(scheme, pattern=None)


def spec(rows: int, columns: int, kind: str = "linear", name: str = "model.layers.0.self_attn.q_proj", **more: Any):
    """A module with one matrix."""
    shape = (columns, rows) if more.get("transposed") else (rows, columns)
    return ModuleSpec(name, kind, 0, {"weight": shape}, **more)


def random_weight(rows: int, columns: int, seed: int = 0) -> Tensor:
    """Values like those of a trained matrix, a few of them large."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator) / math.sqrt(columns)
    return weight * (1 + 8 * (torch.rand(rows, columns, generator=generator) > 0.98))
