"""ONNX Runtime: a decoder with its key-value cache in one graph, prefill and decode alike.

Inputs are called as Hugging Face's exporters call them: `input_ids` and, all optional, `attention_mask`, `position_ids`
and `num_logits_to_keep` (int64); `past_key_values.N.key` and `.value` (B, heads, past, width). Outputs are `logits`
(B, T, V), `present.N.key` and `present.N.value`.
"""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penjing.engines.base import LoadedModel, LoadRequest, SteppingModel
from penjing.errors import EngineError

if TYPE_CHECKING:
    import numpy as np

_PACKAGES = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino", "onnxruntime-directml")
_PAST, _PRESENT = "past_key_values.", "present."
_LARGEST_MESSAGE = 2**31
"""Protocol buffers end here: weights beyond it have to lie in a file of their own."""


class OnnxRuntime:
    """An ONNX file, or a directory with one."""

    name = "onnxruntime"
    summary = "ONNX Runtime; a decoder with its key-value cache in model.onnx"
    install = "pip install 'penjing[onnxruntime]'"
    formats = frozenset({"onnx"})
    tolerance = 0.1  # MatMulNBits rounds its inputs to 8 bits, which costs tiny random models 0.02

    def version(self) -> str | None:
        """Of onnxruntime, whichever of its packages is there."""
        for package in _PACKAGES:
            try:
                return metadata.version(package)
            except metadata.PackageNotFoundError:
                continue
        return None

    def refusal(self, path: Path) -> str | None:
        """No ONNX file, or one that cannot be whole."""
        file = onnx_file(path)
        if file is None:
            return f"ONNX Runtime loads .onnx files; {path} has none: `penjing export {path} --to onnx -o OUT`"
        if file.stat().st_size >= _LARGEST_MESSAGE:
            return f"{file} has 2 GB or more; ONNX cannot hold that in one file: export it with external data"
        return None

    def load(self, request: LoadRequest) -> LoadedModel:
        """A session on the CPU, or on CUDA where this build has it."""
        return OnnxModel(request)


def onnx_file(path: Path) -> Path | None:
    """The graph at `path`: the file itself, `model.onnx` of a directory, or its only .onnx file."""
    if path.suffix == ".onnx" and path.is_file():
        return path
    if not path.is_dir():
        return None
    found = sorted([*path.glob("*.onnx"), *path.glob("onnx/*.onnx")])
    named = [file for file in found if file.name == "model.onnx"]
    return next(iter(named or (found if len(found) == 1 else [])), None)


def holds_graph_weights(directory: Path) -> bool:
    """Whether the safetensors files of a directory are what its graph points into, as in Penjing's format `onnx`."""
    file = directory / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return (config.get("quantization_config") or {}).get("quant_method") == "penjing-onnx"


class OnnxModel(SteppingModel):
    """A session, and what its graph wants to be given."""

    def __init__(self, request: LoadRequest) -> None:
        import onnxruntime

        file = onnx_file(request.path)
        if file is None:
            raise EngineError(f"{request.path}: there is no .onnx file")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = request.threads
        options.log_severity_level = 3
        there = onnxruntime.get_available_providers()
        providers = [name for name in ("CUDAExecutionProvider", "CPUExecutionProvider") if name in there]
        try:
            self.session = onnxruntime.InferenceSession(str(file), options, providers=providers)
        except Exception as error:  # its exceptions share no base class
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise EngineError(f"{file}: ONNX Runtime cannot load it: {reason}") from error
        self.inputs = {node.name: node for node in self.session.get_inputs()}
        self.outputs = [node.name for node in self.session.get_outputs()]
        self._check(file)
        self.vocabulary = self._vocabulary()
        self.read_per_token = _read_per_token(file)

    def _check(self, file: Path) -> None:
        past = [name for name in self.inputs if name.startswith(_PAST)]
        missing = [name for name in ("input_ids", *past) if name not in self.inputs]
        missing += [name for name in ("logits", *(_present(name) for name in past)) if name not in self.outputs]
        if missing or not past:
            named = ", ".join(missing) or f"{_PAST}0.key and the like"
            raise EngineError(f"{file}: not a decoder with a key-value cache: it lacks {named}")

    def _vocabulary(self) -> int:
        size = next(node.shape[-1] for node in self.session.get_outputs() if node.name == "logits")
        if isinstance(size, int):
            return size
        import numpy as np

        return self.begin(np.zeros((1, 1), dtype=np.int64)).logits.shape[-1]

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """See `LoadedModel`."""
        import numpy as np

        return np.stack([_OnnxSession(self, window[None], len(window)).every[0] for window in tokens])

    def begin(self, tokens: np.ndarray) -> _OnnxSession:
        """See `SteppingModel`."""
        return _OnnxSession(self, tokens)


class _OnnxSession:
    """Sequences with their cache, which stays in ONNX Runtime's own memory from step to step."""

    def __init__(self, model: OnnxModel, tokens: np.ndarray, keep: int = 1) -> None:
        import onnxruntime

        self._model, self._length, self._keep = model, 0, keep
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        self._cache = {
            name: self._value(_empty(node, len(tokens)))
            for name, node in model.inputs.items()
            if name.startswith(_PAST)
        }
        self._advance(tokens)

    def step(self, tokens: np.ndarray) -> None:
        """See `Session`."""
        self._advance(tokens[:, None])

    def _advance(self, tokens: np.ndarray) -> None:
        import numpy as np

        batch, count = tokens.shape
        given: dict[str, np.ndarray] = {
            "input_ids": np.ascontiguousarray(tokens, dtype=np.int64),
            "attention_mask": np.ones((batch, self._length + count), dtype=np.int64),
            "position_ids": np.tile(np.arange(self._length, self._length + count, dtype=np.int64), (batch, 1)),
            "num_logits_to_keep": np.array([self._keep], dtype=np.int64),
        }
        known = {name: self._value(array) for name, array in given.items() if name in self._model.inputs}
        names = ["logits", *(_present(name) for name in self._cache)]
        answers = self._model.session.run_with_ort_values(names, known | self._cache)
        self._cache = dict(zip(self._cache, answers[1:], strict=True))
        self._length += count
        self.every: np.ndarray = answers[0].numpy().astype(np.float32, copy=False)
        self.logits = self.every[:, -1]


def _present(past: str) -> str:
    return _PRESENT + past.removeprefix(_PAST)


def _empty(node: Any, batch: int) -> np.ndarray:
    """A cache of no tokens: (B, heads, 0, width)."""
    import numpy as np

    heads, width = (size for size in (node.shape[1], node.shape[3]))
    dtype = {"tensor(float16)": np.float16, "tensor(float)": np.float32}.get(node.type)
    if dtype is None or not isinstance(heads, int) or not isinstance(width, int):
        raise EngineError(f"input {node.name}: {node.type} {node.shape} is no key-value cache that can be begun empty")
    return np.zeros((batch, heads, 0, width), dtype=dtype)


def _read_per_token(file: Path) -> int | None:
    """Bytes of graph and external data, without an untied embedding as config.json beside it tells; None if unknown."""
    config_file = file.parent / "config.json"
    if not config_file.is_file():
        return None
    config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
    if any("experts" in key for key in config) or not config.get("tie_word_embeddings", False):
        return None
    pattern = "*.safetensors" if holds_graph_weights(file.parent) else f"{file.name}*"
    beside = [path for path in file.parent.glob(pattern) if path != file]
    return file.stat().st_size + sum(path.stat().st_size for path in beside)
