"""transformers on torch: what people who train load, and the reference that other engines are compared with."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penjing.checkpoint import open_checkpoint, write_bytes, write_shard
from penjing.checkpoint.directory import SINGLE
from penjing.engines.base import LoadedModel, LoadRequest, SteppingModel
from penjing.engines.onnxruntime import holds_graph_weights
from penjing.errors import EngineError, MissingDependency

if TYPE_CHECKING:
    import numpy as np


class Transformers:
    """Model directories in every format that Penjing writes safetensors for; GGUF files are decoded."""

    name = "transformers"
    summary = "transformers on torch; model directories in any dtype, GGUF files decoded"
    install = "pip install penjing"
    formats = frozenset({"dense", "compressed-tensors", "bitsandbytes", "native", "gptq", "gptq-v2", "awq"})
    tolerance = 1e-6

    def version(self) -> str | None:
        """Of transformers."""
        return metadata.version("transformers")

    def refusal(self, path: Path) -> str | None:
        """A directory of another engine's files."""
        if path.is_dir() and not any(path.glob("*.safetensors")):
            return f"transformers loads safetensors; {path} has none"
        if path.is_dir() and holds_graph_weights(path):
            return f"the weights of {path} are laid out for ONNX Runtime; use --engine onnxruntime"
        return None

    def load(self, request: LoadRequest) -> LoadedModel:
        """`from_pretrained`. Raises EngineError with the reason that transformers gives, MissingDependency where it
        names a package."""
        return TransformersModel(request)


class TransformersModel(SteppingModel):
    """The model in evaluation mode on the first device there is: CUDA, else the CPU."""

    def __init__(self, request: LoadRequest) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(request.threads)
        dtype = request.dtype if request.dtype == "auto" else getattr(torch, request.dtype)
        with _directory(request.path, request.dtype) as directory:
            try:
                model = AutoModelForCausalLM.from_pretrained(
                    directory, dtype=dtype, trust_remote_code=request.trust_remote_code
                )
            except Exception as error:  # whatever configuration, quantiser and model classes raise
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                if isinstance(error, ImportError):
                    raise MissingDependency(f"{request.path}: transformers needs a package for it: {reason}") from error
                raise EngineError(f"{request.path}: transformers cannot load it: {reason}") from error
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._torch, self._model = torch, model.eval().to(device)
        self.vocabulary = model.get_output_embeddings().weight.shape[0]
        self.read_per_token = _read_per_token(model)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """See `LoadedModel`."""
        with self._torch.inference_mode():
            given = self._torch.from_numpy(tokens).to(self._model.device)
            return self._model(input_ids=given, use_cache=False).logits.float().cpu().numpy()

    def begin(self, tokens: np.ndarray) -> _TorchSession:
        """See `SteppingModel`."""
        return _TorchSession(self._torch, self._model, tokens)


class _TorchSession:
    """Sequences with their key-value cache."""

    def __init__(self, torch: Any, model: Any, tokens: np.ndarray) -> None:
        self._torch, self._model, self._cache = torch, model, None
        self._advance(tokens)

    def step(self, tokens: np.ndarray) -> None:
        """See `Session`."""
        self._advance(tokens[:, None])

    def _advance(self, tokens: np.ndarray) -> None:
        with self._torch.inference_mode():
            given = self._torch.from_numpy(tokens).to(self._model.device)
            answer = self._model(input_ids=given, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._cache = answer.past_key_values
        self.logits = answer.logits[:, -1].float().cpu().numpy()


def _read_per_token(model: Any) -> int | None:
    """Bytes of parameters and buffers in memory that a token reads; None for mixtures of experts."""
    if any("experts" in name for name, _ in model.named_modules()):
        return None
    held = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    if embedding is not head:
        held.pop(id(embedding), None)
    return sum(tensor.numel() * tensor.element_size() for tensor in held.values())


@contextmanager
def _directory(path: Path, dtype: str) -> Iterator[Path]:
    """`path`, or a GGUF file written as plain tensors for as long as it takes to load them."""
    if path.is_dir():
        yield path
        return
    import json

    import torch

    checkpoint = open_checkpoint(path)
    stored = torch.float32 if dtype == "auto" else getattr(torch, dtype)
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder)
        write_shard(directory / SINGLE, {name: checkpoint.load(name).to(stored) for name in checkpoint.specs()})
        config = checkpoint.config | {"dtype": str(stored).removeprefix("torch.")}
        write_bytes(directory / "config.json", json.dumps(config).encode())
        yield directory
