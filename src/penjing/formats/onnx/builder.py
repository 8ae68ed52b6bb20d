"""Nodes and tensors of a graph, with names made as they come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from penjing.checkpoint.safetensors_header import read_header
from penjing.errors import FormatError

if TYPE_CHECKING:
    import onnx

CONTRIB = "com.microsoft"
"""The domain of the operators that ONNX Runtime adds to the standard."""
OPSET, IR_VERSION = 21, 10
_TYPES = {"float32": 1, "uint8": 2, "int8": 3, "int32": 6, "int64": 7, "float16": 10, "bfloat16": 16}
"""torch name -> the number of the type in ONNX."""
FLOAT = _TYPES["float32"]


class Builder:
    """Collects a graph over the tensors of the shards in `directory`. Values are called by name."""

    def __init__(self, directory: Path) -> None:
        self._nodes: list[onnx.NodeProto] = []
        self._tensors: dict[str, onnx.TensorProto] = {}
        self._where = {}
        for shard in sorted(directory.glob("*.safetensors")):
            header = read_header(shard)
            for name, spec in header.tensors.items():
                self._where[name] = (shard.name, header.begins[name], spec)

    def node(self, operator: str, inputs: Sequence[str], *, domain: str = "", **attributes: Any) -> str:
        """Add a node with one output; the name of that."""
        return self.nodes(operator, inputs, 1, domain=domain, **attributes)[0]

    def nodes(
        self,
        operator: str,
        inputs: Sequence[str],
        outputs: int | Sequence[str],
        *,
        domain: str = "",
        **attributes: Any,
    ) -> list[str]:
        """Add a node; the names of its outputs, which are given or made."""
        from onnx import helper

        base = f"{operator}_{len(self._nodes)}"
        names = [f"{base}:{number}" for number in range(outputs)] if isinstance(outputs, int) else list(outputs)
        self._nodes.append(helper.make_node(operator, list(inputs), names, name=base, domain=domain, **attributes))
        return names

    def stored(self, name: str, shape: Sequence[int] | None = None) -> str:
        """A tensor of a shard, perhaps in another `shape`. Raises FormatError when it is not there."""
        from onnx import TensorProto

        if name not in self._where:
            raise FormatError(f"the shards hold no tensor {name!r}; the model is incomplete")
        shard, begin, spec = self._where[name]
        dims = list(spec.shape if shape is None else shape)
        label = name if shape is None else f"{name}:{'x'.join(map(str, dims))}"
        if label not in self._tensors:
            tensor = TensorProto(name=label, data_type=_TYPES[spec.dtype], dims=dims)
            tensor.data_location = TensorProto.EXTERNAL
            for key, value in (("location", shard), ("offset", str(begin)), ("length", str(spec.nbytes))):
                tensor.external_data.add(key=key, value=value)
            self._tensors[label] = tensor
        return label

    def in_fp32(self, name: str, shape: Sequence[int] | None = None) -> str:
        """A stored tensor as fp32; ONNX Runtime converts it once, when it loads the graph."""
        label = self.stored(name, shape)
        stored = self._where[name][2].dtype == "float32"
        return label if stored else self.node("Cast", [label], to=FLOAT)

    def constant(self, name: str, values: np.ndarray | np.generic) -> str:
        """A small tensor that lies in the graph itself; equal names mean equal values."""
        from onnx import numpy_helper

        if name not in self._tensors:
            self._tensors[name] = numpy_helper.from_array(np.asarray(values), name)
        return name

    def model(
        self, name: str, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]
    ) -> onnx.ModelProto:
        """The whole graph."""
        from onnx import helper

        graph = helper.make_graph(self._nodes, name, inputs, outputs, list(self._tensors.values()))
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid(CONTRIB, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="penjing")
