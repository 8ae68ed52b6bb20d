"""A GGUF file, presented as a Hugging Face checkpoint: names, orientation and row order are put back on loading."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penjing.checkpoint.base import TensorSpec
from penjing.checkpoint.fingerprint import fingerprint
from penjing.checkpoint.gguf_config import ROPE_TENSORS, SPECIAL_TOKENS, architecture_of, make_config
from penjing.checkpoint.gguf_header import GGUFHeader, GGUFTensor, read_gguf_header
from penjing.checkpoint.gguf_names import Architecture
from penjing.checkpoint.gguf_tokenizer import tokenizer_files
from penjing.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


class GGUFCheckpoint:
    """A model in one GGUF file. Opening it reads the header; `load` dequantises one tensor to fp32."""

    def __init__(self, path: Path, *, label: str | None = None) -> None:
        self.path = path
        self.label = label or path.stem
        self._header: GGUFHeader = read_gguf_header(path)
        self._architecture: Architecture = architecture_of(self._header, path)
        self.config: dict[str, Any] = make_config(self._header, path, self._factors)
        self._stored = _hugging_face_names(self._header, self._architecture, path)

    def specs(self) -> dict[str, TensorSpec]:
        """Every tensor by its Hugging Face name; `nbytes` is what it takes in the file, the dtype that of `load`."""
        return {
            name: TensorSpec(tensor.shape[:: -1 if self._is_transposed(name) else 1], "float32", tensor.nbytes)
            for name, tensor in self._stored.items()
        }

    def load(self, name: str) -> Tensor:
        """One tensor in fp32, as Hugging Face stores it. Raises CheckpointError naming file and tensor."""
        import torch

        if name not in self._stored:
            raise CheckpointError(f"{self.path}: there is no tensor {name!r}")
        values = torch.from_numpy(self._values(self._stored[name]))
        if self._is_transposed(name):
            return values.T.contiguous()
        if self._architecture.rotary == "interleaved" and name.endswith(("q_proj.weight", "k_proj.weight")):
            heads = self.config["num_attention_heads" if name.endswith("q_proj.weight") else "num_key_value_heads"]
            return _pairs_to_halves(values, heads)
        if self._architecture.norm_offset and name.endswith("norm.weight"):
            return values - self._architecture.norm_offset
        return values

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Tokenizer files made from the metadata, chat template included, and generation_config.json."""
        yield from self._companions

    def tokenizer_keys(self) -> dict[str, Any]:
        """The tokenizer and the chat template as the metadata has them."""
        return {key: value for key, value in self._header.keys.items() if key.startswith("tokenizer.")}

    def fingerprint(self) -> str:
        """Hex digest of metadata, tensor table, size and sampled contents."""
        table = hashlib.sha256(repr((self._header.keys, self._header.tensors)).encode()).hexdigest()
        return fingerprint({"config": self.config, "header": table}, [self.path])

    def _is_transposed(self, name: str) -> bool:
        """True for the weight of a module that Hugging Face stores as (inputs, outputs)."""
        module, _, parameter = name.rpartition(".")
        return parameter == "weight" and module.split(".", 3)[-1] in self._architecture.transposed

    def _factors(self, name: str) -> list[float]:
        return [float(value) for value in self._values(self._header.tensors[name])]

    def _values(self, tensor: GGUFTensor) -> np.ndarray:
        """Dequantised values, a fresh fp32 array in the tensor's shape."""
        import numpy as np
        from gguf.quants import dequantize, quant_shape_to_byte_shape

        try:
            with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                raw = np.frombuffer(data[tensor.start : tensor.start + tensor.nbytes], dtype=np.uint8)
            packed = raw.reshape(quant_shape_to_byte_shape(tensor.shape, tensor.quantization))
            values = dequantize(packed, tensor.quantization)
        except (OSError, ValueError, NotImplementedError) as error:
            raise CheckpointError(f"{self.path}: tensor {tensor.name!r} cannot be decoded: {error}") from error
        return np.array(values, dtype=np.float32).reshape(tensor.shape)

    @cached_property
    def _companions(self) -> list[tuple[str, bytes]]:
        files = tokenizer_files(self.path, self._header)
        tokens = {key: self.config[key] for key in SPECIAL_TOKENS.values() if self.config.get(key) is not None}
        files["generation_config.json"] = (json.dumps(tokens, indent=2) + "\n").encode()
        return sorted(files.items())


def _hugging_face_names(header: GGUFHeader, architecture: Architecture, path: Path) -> dict[str, GGUFTensor]:
    """Tensors by Hugging Face name. Raises CheckpointError that lists the tensors without one."""
    named: dict[str, GGUFTensor] = {}
    unknown = []
    for stored, tensor in header.tensors.items():
        if stored in ROPE_TENSORS:  # already in the config
            continue
        module, _, parameter = stored.rpartition(".")
        parts = module.split(".")
        if parts[0] == "blk" and len(parts) == 3 and parts[1].isdigit() and parts[2] in architecture.block:
            named[f"{architecture.block_path}.{parts[1]}.{architecture.block[parts[2]]}.{parameter}"] = tensor
        elif module in architecture.outside:
            named[f"{architecture.outside[module]}.{parameter}"] = tensor
        else:
            unknown.append(stored)
    if unknown:
        listed = ", ".join(unknown[:5]) + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
        raise CheckpointError(f"{path}: no place in a {architecture.model_type} model for {listed}")
    return named


def _pairs_to_halves(weight: Tensor, heads: int) -> Tensor:
    """Undo llama.cpp's row order: within a head, (pair, member) back to (member, pair). Shape (N, K) or (N,)."""
    pairs = weight.shape[0] // heads // 2
    return weight.reshape(heads, pairs, 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape).contiguous()
