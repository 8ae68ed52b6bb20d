"""Running a written graph in ONNX Runtime, as it is or with the inputs of its products left in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from penjing.errors import FormatError, MissingDependency

_FULL = 1
"""`accuracy_level` of fp32 inputs."""


def open_graph(file: Path, *, exact: bool = False, threads: int = 0) -> Any:
    """A session on the CPU; `exact` keeps inputs of products in fp32. Raises FormatError if it cannot load."""
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise MissingDependency(f"{error.name} is needed to run {file.name}: pip install 'penjing[onnx]'") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    try:
        graph = onnx.load(file, load_external_data=False)
        for node in graph.graph.node if exact else ():
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = _FULL
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(file.parent))
        return onnxruntime.InferenceSession(graph.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # neither package has a base class of its errors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FormatError(f"{file}: ONNX Runtime cannot load it: {reason}") from error


def empty_cache(session: Any, batch: int) -> dict[str, Any]:
    """The cache of no tokens, by the names of the graph's inputs."""
    import numpy as np

    shapes = {node.name: node.shape for node in session.get_inputs() if node.name.startswith("past_key_values.")}
    return {name: np.zeros((batch, shape[1], 0, shape[3]), dtype=np.float32) for name, shape in shapes.items()}


def logits(file: Path, tokens: Tensor, *, exact: bool = False) -> Tensor:
    """Logits (B, T, V) fp32 of token windows (B, T), without a past."""
    session = open_graph(file, exact=exact)
    ids = tokens.numpy()
    given = {"input_ids": ids, "attention_mask": torch.ones_like(tokens).numpy()}
    (found,) = session.run(["logits"], given | empty_cache(session, len(ids)))
    return torch.from_numpy(found)
