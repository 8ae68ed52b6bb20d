"""From finished shards to one GGUF file, one tensor in memory at a time."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from penjing.checkpoint.base import Checkpoint
from penjing.checkpoint.gguf_names import ARCHITECTURES, Architecture
from penjing.checkpoint.writing import write_atomically
from penjing.errors import CheckpointError, FormatError, MissingDependency
from penjing.formats.base import Finished
from penjing.formats.gguf.metadata import architecture_name, config_problems, model_keys, rope_vectors
from penjing.formats.gguf.tokenizer import tokenizer_keys
from penjing.formats.gguf.types import PLAIN, blocks_of, type_of
from penjing.models.layout import Layout, ModuleSpec
from penjing.representations import Scheme

if TYPE_CHECKING:
    import gguf


def refusals(layout: Layout, config: Mapping[str, Any]) -> list[str]:
    """Why llama.cpp could not run the model: architecture, config, a module without a place."""
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependency("writing GGUF files needs gguf: pip install 'penjing[gguf]'")
    try:
        architecture = ARCHITECTURES[architecture_name(config)]
    except CheckpointError as error:
        return [str(error)]
    modules = [module.name for module in layout.modules if module.tensors]
    lost = [name for name in modules if architecture.stored_name(name) is None]
    problems = [f"llama.cpp has no tensor for {', '.join(lost[:3])}"] if lost else []
    if architecture.model_type == "gemma2" and not layout.tied:
        problems.append("llama.cpp runs Gemma 2 with the embedding as its head, and here they differ")
    return problems + config_problems(config)


def tokenizer_problems(checkpoint: Checkpoint) -> list[str]:
    """Why the tokenizer cannot be written; empty also where there is only a config.json to plan for."""
    try:
        if checkpoint.specs():
            _tokenizer(checkpoint)
    except CheckpointError as error:
        return [str(error)]
    return []


def _tokenizer(checkpoint: Checkpoint) -> dict[str, Any]:
    """A GGUF source's own keys, or what its tokenizer files say."""
    own: Callable[[], dict[str, Any]] | None = getattr(checkpoint, "tokenizer_keys", None)
    return own() if own is not None else tokenizer_keys(dict(checkpoint.files()), checkpoint.config)


@dataclass(frozen=True)
class _Entry:
    """One tensor of the file: `shape` in bytes, outermost first; `read` gives them as uint8."""

    name: str
    kind: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape)


def assemble(finished: Finished) -> Path:
    """Write the file; equal shards give equal bytes. Raises FormatError, OutputError."""
    import gguf

    path = finished.directory / f"{finished.directory.resolve().name}.gguf"
    architecture = ARCHITECTURES[architecture_name(finished.config)]
    entries = [*_vectors(finished.config), *_tensors(finished, architecture)]
    keys = _general(finished, entries) | model_keys(finished.config) | _tokenizer(finished.source)
    with _quiet():
        writer = gguf.GGUFWriter(None, architecture_name(finished.config))
    for key, value in keys.items():
        _add(writer, key, value)
    for entry in entries:
        kind = gguf.GGMLQuantizationType[entry.kind]
        writer.add_tensor_info(entry.name, entry.shape, _numpy().dtype("uint8"), entry.nbytes, kind)

    def save(temporary: Path) -> None:
        writer.write_header_to_file(temporary)
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for entry in entries:
            writer.write_tensor_data(entry.read().numpy())
        writer.close()

    with _quiet():
        write_atomically(path, sum(entry.nbytes for entry in entries), save)
    return path


def convert(checkpoint: Checkpoint, layout: Layout, directory: Path, dtype: torch.dtype) -> Path:
    """A dense model as it is, matrices in `dtype`. Raises FormatError that says what cannot be written, OutputError."""
    if reasons := [*refusals(layout, checkpoint.config), *tokenizer_problems(checkpoint)]:
        raise FormatError(f"{checkpoint.label} cannot be written as GGUF: {'; '.join(reasons)}")
    directory.mkdir(parents=True, exist_ok=True)

    def load(name: str) -> Tensor:
        tensor = checkpoint.load(name)
        return tensor if tensor.dim() == 1 else tensor.to(dtype)

    return assemble(Finished(directory, layout, {}, checkpoint.config, dtype, checkpoint, load))


def _general(finished: Finished, entries: list[_Entry]) -> dict[str, Any]:
    import gguf

    weight: Counter[str] = Counter()
    for entry in entries:
        weight[entry.kind] += entry.nbytes
    most = weight.most_common(1)[0][0]
    names = {"F32": "ALL_F32", "Q2_K": "MOSTLY_Q2_K", "Q3_K": "MOSTLY_Q3_K_S", "Q4_K": "MOSTLY_Q4_K_S"}
    names |= {"Q5_K": "MOSTLY_Q5_K_S", "MXFP4": "MOSTLY_MXFP4_MOE"}
    title = finished.source.label
    if finished.config["model_type"] == "mistral" and "mistral" not in title.lower():
        title += " (Mistral)"
    return {
        "general.type": "model",
        "general.name": title,
        "general.file_type": int(gguf.LlamaFileType[names.get(most, f"MOSTLY_{most}")]),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
    }


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    import gguf

    kinds = gguf.GGUFValueType
    if isinstance(value, list):
        writer.add_array(key, value)
    else:
        named = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}
        writer.add_key_value(key, value, named[type(value)])


def _vectors(config: Mapping[str, Any]) -> Iterator[_Entry]:
    for name, factors in rope_vectors(config).items():
        yield _Entry(name, "F32", (4 * len(factors),), partial(_bytes, torch.tensor(factors)))


def _tensors(finished: Finished, architecture: Architecture) -> Iterator[_Entry]:
    for module in finished.layout.modules:
        stored = architecture.stored_name(module.name)
        for key, name in zip(module.tensors, module.tensor_names(), strict=True):
            if stored is None:
                raise FormatError(f"{name} has no place in a GGUF file of this architecture")
            scheme = finished.schemes.get(module.name, Scheme()) if key == "weight" else Scheme()
            yield _entry(finished, architecture, module, f"{stored}.{key}", name, scheme)


def _entry(
    finished: Finished, architecture: Architecture, module: ModuleSpec, stored: str, name: str, scheme: Scheme
) -> _Entry:
    heads = _paired_heads(finished.config, architecture, module)

    def read() -> Tensor:
        tensor = finished.load(name)
        if tensor.dim() == 1 and architecture.norm_offset and module.kind == "norm":
            tensor = tensor.float() + architecture.norm_offset
        if tensor.dim() == 1:
            tensor = tensor.float()
        elif module.transposed and scheme.grid is None:
            tensor = tensor.T
        return _bytes(tensor if heads is None else halves_to_pairs(tensor, heads))

    key = name.removeprefix(f"{module.name}.")
    shape = module.tensors[key]
    if scheme.grid is not None:
        kind = type_of(scheme.grid)
        assert kind is not None
        blocks, (rows, columns) = blocks_of(scheme.grid), module.shape
        return _Entry(stored, kind, (rows, columns // blocks.width * blocks.size), read)
    if len(shape) == 1:
        return _Entry(stored, "F32", (4 * shape[0],), read)
    rows, columns = module.shape if key == "weight" else shape
    return _Entry(stored, PLAIN[finished.dtype], (rows, columns * finished.dtype.itemsize), read)


def _paired_heads(config: Mapping[str, Any], architecture: Architecture, module: ModuleSpec) -> int | None:
    """Number of heads in the rows of a query or key linear that llama.cpp stores in another order; None elsewhere."""
    if architecture.rotary != "interleaved":
        return None
    queries = int(config["num_attention_heads"])
    if module.name.endswith("k_proj"):
        return int(config.get("num_key_value_heads") or queries)
    return queries if module.name.endswith("q_proj") else None


def halves_to_pairs(rows: Tensor, heads: int) -> Tensor:
    """llama.cpp's row order: within a head, (member, pair) becomes (pair, member). Rows of anything, (N, ...)."""
    pairs = rows.shape[0] // heads // 2
    return rows.reshape(heads, 2, pairs, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _numpy() -> Any:
    import numpy

    return numpy


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The writer of the gguf package reports what it does as if it were news."""
    logger = logging.getLogger("gguf.gguf_writer")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
