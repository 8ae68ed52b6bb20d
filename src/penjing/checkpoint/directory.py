"""A directory in Hugging Face's form: config.json, safetensors shards, tokenizer files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from io import RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penjing.checkpoint.base import TensorSpec
from penjing.checkpoint.fingerprint import fingerprint
from penjing.checkpoint.safetensors_header import Header, read_header
from penjing.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
PICKLE_ADVICE = (
    "Penjing reads safetensors only: a pickle runs code when it is opened and is never unpickled here. Convert it "
    "once, on a machine where you trust it: AutoModelForCausalLM.from_pretrained(path).save_pretrained(new_path)"
)
COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "additional_chat_templates/*.jinja")


class SafetensorsCheckpoint:
    """A model in a directory, opened lazily: construction reads config.json and the shards' headers.

    Tensor names are those of the causal language model: a checkpoint of the bare model, saved without the prefix
    `model.` or `transformer.`, is presented with it.
    """

    def __init__(self, path: Path, *, label: str | None = None, trust_remote_code: bool = False) -> None:
        self.path = path
        self.label = label or path.resolve().name
        self.config = read_config(path, trust_remote_code)
        self._remote_code = trust_remote_code
        self._headers = {shard: read_header(shard) for shard in _find_shards(path)}
        self._shard_of = _locate(self._headers)
        _check_index(path, self._shard_of)
        self._stored_name = _language_model_names(str(self.config.get("model_type")), self._shard_of)

    def specs(self) -> dict[str, TensorSpec]:
        """Every stored tensor by name, from the headers."""
        return {
            name: self._headers[self._shard_of[stored]].tensors[stored] for name, stored in self._stored_name.items()
        }

    def load(self, name: str) -> Tensor:
        """One tensor as stored. Raises CheckpointError naming file and tensor.

        It is read, not mapped: the pages of a mapped file count as memory of the process for as long as the file is
        open, and a file that is cut off meanwhile would kill it.
        """
        import torch

        stored = self._stored_name.get(name)
        if stored is None:
            raise CheckpointError(f"{self.path}: there is no tensor {name!r}")
        shard = self._shard_of[stored]
        spec, begin = self._headers[shard].tensors[stored], self._headers[shard].begins[stored]
        content = torch.empty(spec.nbytes, dtype=torch.uint8)
        try:
            with shard.open("rb", buffering=0) as file:
                file.seek(begin)
                found = _read_into(file, content.numpy().data)
        except OSError as error:
            raise CheckpointError(f"{shard}: tensor {name!r} cannot be read: {error.strerror}") from error
        if found < spec.nbytes:
            raise CheckpointError(
                f"{shard}: tensor {name!r} cannot be read: the file ends {spec.nbytes - found} bytes early"
            )
        return content.view(getattr(torch, spec.dtype)).view(spec.shape)

    def files(self) -> Iterator[tuple[str, bytes]]:
        """Everything else that makes the model: tokenizer, templates, generation config (and, when trusted, code)."""
        patterns = (*COMPANIONS, "*.py") if self._remote_code else COMPANIONS
        for path in sorted({path for pattern in patterns for path in self.path.glob(pattern)}):
            if path.is_file() and path.name != "config.json" and not path.name.endswith(".index.json"):
                yield path.relative_to(self.path).as_posix(), path.read_bytes()

    def fingerprint(self) -> str:
        """Hex digest of config, headers, sizes and sampled contents."""
        headers = {shard.name: hashlib.sha256(header.raw).hexdigest() for shard, header in self._headers.items()}
        return fingerprint({"config": self.config, "headers": headers}, self._headers)


def _read_into(file: RawIOBase, target: memoryview) -> int:
    """Fill `target` as far as the file goes; one call reads at most 2 GB."""
    done = 0
    while done < len(target) and (count := file.readinto(target[done:])):
        done += count
    return done


def read_config(path: Path, trust_remote_code: bool) -> dict[str, Any]:
    """config.json of a directory. Raises CheckpointError without one, or when the model needs its own code."""
    file = path / "config.json"
    if not file.is_file():
        raise CheckpointError(f"{path}: no config.json; give the directory of a Hugging Face model")
    config = read_json(file)
    if not isinstance(config.get("model_type"), str):
        raise CheckpointError(f"{file}: no `model_type`, so the architecture is unknown")
    if "auto_map" in config and not _known_to_transformers(config["model_type"]):
        if not trust_remote_code:
            raise CheckpointError(
                f"{path}: model type {config['model_type']!r} runs Python code that comes with the model; "
                "read that code, then pass trust_remote_code (--trust-remote-code)"
            )
        config["_name_or_path"] = str(path)
    return config


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError naming the file."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{file}: expected a JSON object, found {type(data).__name__}")
    return data


def _known_to_transformers(model_type: str) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return model_type in CONFIG_MAPPING_NAMES


def _find_shards(path: Path) -> list[Path]:
    if (path / INDEX).is_file():
        weight_map = _weight_map(path)
        names = sorted(set(weight_map.values()))
        for name in names:
            if Path(name).name != name:
                raise CheckpointError(f"{path / INDEX}: shard {name!r} is outside the directory")
            if not (path / name).is_file():
                tensors = sum(shard == name for shard in weight_map.values())
                raise CheckpointError(f"{path}: shard {name} is missing ({tensors} tensors); download it again")
        return [path / name for name in names]
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    pickles = sorted(entry.name for entry in path.iterdir() if entry.suffix in PICKLES)
    if pickles:
        raise CheckpointError(f"{path}: has no {SINGLE}, only {pickles[0]}. {PICKLE_ADVICE}")
    raise CheckpointError(f"{path}: neither {SINGLE} nor {INDEX} is there")


def _weight_map(path: Path) -> dict[str, str]:
    weight_map = read_json(path / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise CheckpointError(f"{path / INDEX}: `weight_map` must map tensor names to file names")
    return weight_map


def _locate(headers: dict[Path, Header]) -> dict[str, Path]:
    shard_of: dict[str, Path] = {}
    for shard, header in headers.items():
        for name in header.tensors:
            if name in shard_of:
                raise CheckpointError(f"{shard}: tensor {name!r} is also in {shard_of[name].name}")
            shard_of[name] = shard
    return shard_of


def _check_index(path: Path, shard_of: dict[str, Path]) -> None:
    if not (path / INDEX).is_file():
        return
    weight_map = _weight_map(path)
    for name, shard in weight_map.items():
        if name not in shard_of or shard_of[name].name != shard:
            raise CheckpointError(f"{path / INDEX}: says tensor {name!r} is in {shard}, but it is not")
    for name, file in shard_of.items():
        if name not in weight_map:
            raise CheckpointError(f"{path / INDEX}: does not list tensor {name!r}, which {file.name} holds")


_PREFIXES = {
    "bert": "bert.",
    "distilbert": "distilbert.",
    "gpt2": "transformer.",
    "gpt_neox": "gpt_neox.",
    "roberta": "roberta.",
    "xlm-roberta": "roberta.",
}
"""Model type -> what the body's tensors begin with in a model with a head, where it is not `model.`."""


def _language_model_names(model_type: str, stored: dict[str, Path]) -> dict[str, str]:
    """Name in the causal language model -> name in the file."""
    prefix = _PREFIXES.get(model_type, "model.")
    bare = not any(name.startswith(prefix) for name in stored) and any(
        re.match(r"(decoder\.|encoder\.|transformer\.)?(layers|layer|h)\.\d+\.", name) for name in stored
    )
    heads = ("lm_head.", "embed_out.")
    named = {prefix + name if bare and not name.startswith(heads) else name: name for name in stored}
    if model_type == "gpt_neox" and "lm_head.weight" in named:
        named["embed_out.weight"] = named.pop("lm_head.weight")
    return named


def load_shard(path: Path) -> dict[str, Tensor]:
    """All tensors of one safetensors file. Raises CheckpointError saying what is wrong with a damaged one."""
    from safetensors.torch import load_file

    read_header(path)
    return load_file(path)
