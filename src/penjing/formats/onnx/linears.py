"""Matrix products of a graph: which operators multiply a weight, given how it is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from penjing.formats.onnx.builder import CONTRIB, FLOAT, Builder
from penjing.formats.onnx.layouts import BLOCKS, CODES, INTEGERS, SCALE, ZERO, block_size, layout_of
from penjing.models.layout import Layout
from penjing.numerics.grids import IntegerGrid
from penjing.representations import Scheme

ACCURACY_LEVEL = 4
"""Of `MatMulNBits`: inputs are rounded to 8 bits, per token and block, and integers multiplied. Level 1 keeps inputs in
fp32; there ONNX Runtime 1.31 decodes 8- and 2-bit weights anew for every token (benchmarks/LOG.md)."""


class Linears:
    """Adds products to a graph, and remembers inputs that were rounded once for several of them."""

    def __init__(self, graph: Builder, layout: Layout, schemes: Mapping[str, Scheme]) -> None:
        self.graph = graph
        self._modules, self._schemes = layout.by_name, schemes
        self._rounded: dict[str, tuple[str, str]] = {}

    def alike(self, names: Sequence[str]) -> bool:
        """Whether linears that read the same input can be one product of their stacked outputs."""
        schemes = {self._scheme(name) for name in names}
        biased = {"bias" in self._modules[name].tensors for name in names}
        how = next(iter(schemes)).activations
        return len(schemes) == len(biased) == 1 and (how is None or how.dynamic)

    def product(self, x: str, names: Sequence[str]) -> str:
        """Outputs of `alike` linears for the input `x` (B, S, K), side by side; biases are added."""
        scheme, layout = self._scheme(names[0]), layout_of(self._scheme(names[0]))
        if layout is BLOCKS and isinstance(scheme.grid, IntegerGrid):
            y = self._blocks(x, names, scheme.grid)
        elif layout is INTEGERS and scheme.activations is not None:
            y = self._integers(x, names) if scheme.activations.dynamic else self._static(x, names[0], scheme)
        else:
            y = self.graph.node("MatMul", [x, self._stacked([self._dense(name) for name in names], 1)])
        if "bias" not in self._modules[names[0]].tensors:
            return y
        return self.graph.node("Add", [y, self._stacked([self.graph.in_fp32(f"{name}.bias") for name in names], 0)])

    def rows(self, name: str, ids: str) -> str:
        """Rows of an embedding by token ids (B, S): fp32 (B, S, K)."""
        graph, grid, module = self.graph, self._scheme(name).grid, self._modules[name]
        if not isinstance(grid, IntegerGrid):
            return graph.node("Cast", [graph.node("Gather", [graph.stored(f"{name}.weight"), ids], axis=0)], to=FLOAT)
        rows, columns = module.shape
        inputs = [
            graph.stored(f"{name}.{CODES}", (rows, columns * grid.bits // 8)),
            ids,
            graph.in_fp32(f"{name}.{SCALE}"),
        ]
        inputs += [] if grid.symmetric else [graph.stored(f"{name}.{ZERO}")]
        return graph.node(
            "GatherBlockQuantized",
            inputs,
            domain=CONTRIB,
            bits=grid.bits,
            block_size=block_size(grid),
            gather_axis=0,
            quantize_axis=1,
        )

    def _scheme(self, name: str) -> Scheme:
        return self._schemes.get(name, Scheme())

    def _stacked(self, parts: Sequence[str], axis: int) -> str:
        """Side by side along the outputs; ONNX Runtime does it once, when it loads the graph."""
        return parts[0] if len(parts) == 1 else self.graph.node("Concat", parts, axis=axis)

    def _dense(self, name: str) -> str:
        """A plain weight as (K, N) fp32."""
        weight = self.graph.in_fp32(f"{name}.weight")
        return weight if self._modules[name].transposed else self.graph.node("Transpose", [weight], perm=[1, 0])

    def _blocks(self, x: str, names: Sequence[str], grid: IntegerGrid) -> str:
        graph, modules = self.graph, [self._modules[name] for name in names]
        inputs = [
            x,
            self._stacked([graph.stored(f"{name}.{CODES}") for name in names], 0),
            self._stacked([graph.in_fp32(f"{name}.{SCALE}") for name in names], 0),
        ]
        if not grid.symmetric:
            inputs.append(self._stacked([graph.stored(f"{name}.{ZERO}") for name in names], 0))
        return graph.node(
            "MatMulNBits",
            inputs,
            domain=CONTRIB,
            N=sum(module.shape[0] for module in modules),
            K=modules[0].shape[1],
            bits=grid.bits,
            block_size=block_size(grid),
            accuracy_level=ACCURACY_LEVEL,
        )

    def _integers(self, x: str, names: Sequence[str]) -> str:
        """Inputs with a scale per token: divided by it first, multiplied by it last; the operator has the scale 1."""
        graph = self.graph
        codes, scale = self._codes_of(x)
        one, zero = graph.constant("one", np.float32(1)), graph.constant("middle", np.uint8(128))
        weight = self._stacked([graph.stored(f"{name}.{CODES}") for name in names], 1)
        weight_scale = self._stacked([graph.in_fp32(f"{name}.{SCALE}") for name in names], 0)
        y = graph.node("MatMulIntegerToFloat", [codes, weight, one, weight_scale, zero], domain=CONTRIB)
        return graph.node("Mul", [y, scale])

    def _codes_of(self, x: str) -> tuple[str, str]:
        """Unsigned codes of `x`, 128 for zero, and the scale of each token (B, S, 1)."""
        if x not in self._rounded:
            graph = self.graph
            last = graph.constant("last_axis", np.array([-1], dtype=np.int64))
            largest = graph.node("ReduceMax", [graph.node("Abs", [x]), last], keepdims=1)
            scale = graph.node("Div", [largest, graph.constant("half_range", np.float32(127.5))])
            scale = graph.node("Max", [scale, graph.constant("least", np.finfo(np.float32).eps)])
            inputs = [graph.node("Div", [x, scale]), graph.constant("one", np.float32(1))]
            codes = graph.node("QuantizeLinear", [*inputs, graph.constant("middle", np.uint8(128))])
            self._rounded[x] = codes, scale
        return self._rounded[x]

    def _static(self, x: str, name: str, scheme: Scheme) -> str:
        """Inputs with one measured scale, in the standard's own form: quantise, decode, multiply, which is fused."""
        graph, how = self.graph, scheme.activations
        by = [graph.stored(f"{name}.input_scale", ())]
        if how is not None and not how.symmetric:
            by.append(graph.stored(f"{name}.input_zero_point", ()))
        else:
            by.append(graph.constant("no_zero_point", np.int8(0)))
        codes = graph.node("QuantizeLinear", [x, *by])
        weight = [graph.stored(f"{name}.{CODES}"), graph.in_fp32(f"{name}.{SCALE}")]
        decoded = graph.node("DequantizeLinear", weight, axis=1)
        return graph.node("MatMul", [graph.node("DequantizeLinear", [codes, *by]), decoded])
