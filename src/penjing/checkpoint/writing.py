"""Writing without leaving half a file behind: a temporary file beside the target, fsync, rename."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from penjing.checkpoint.directory import INDEX
from penjing.checkpoint.safetensors_header import DTYPES
from penjing.errors import OutputError

if TYPE_CHECKING:
    from torch import Tensor

CODES = {name: code for code, (name, _) in DTYPES.items()}
"""torch name of a dtype -> its name in the file."""


def write_shard(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write a safetensors file, or nothing; equal contents give equal bytes. Raises OutputError.

    (The safetensors library writes metadata in an order that changes from run to run.)
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    entries: dict[str, object] = {"__metadata__": dict(sorted({"format": "pt", **(metadata or {})}.items()))}
    position = 0
    for name, tensor in ordered:
        end = position + tensor.numel() * tensor.element_size()
        dtype = CODES[str(tensor.dtype).removeprefix("torch.")]
        entries[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            for _, tensor in ordered:
                file.write(_bytes_of(tensor))

    write_atomically(path, 8 + len(header) + position, save)


def _bytes_of(tensor: Tensor) -> memoryview:
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file, or nothing. Missing directories are made. Raises OutputError."""
    write_atomically(path, len(data), lambda temporary: temporary.write_bytes(data))


def write_index(directory: Path, shards: Mapping[str, Sequence[str]], total_size: int) -> None:
    """Write model.safetensors.index.json: `shards` maps file names to tensor names, `total_size` is in bytes."""
    weight_map = {name: shard for shard, names in shards.items() for name in names}
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    write_bytes(directory / INDEX, (json.dumps(index, indent=2) + "\n").encode())


def write_atomically(path: Path, size: int, save: Callable[[Path], object]) -> None:
    """`save` into a temporary file, which takes the place of `path` once it is whole. Raises OutputError.

    size  bytes that will be written, for the message when the disk is full
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save(temporary)
            _sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync(path.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            free = shutil.disk_usage(path.parent).free
            reason = f"the disk is full: {size:,} bytes needed, {free:,} free; free some space and run again"
            raise OutputError(f"{path}: {reason}") from error
        raise OutputError(f"{path}: cannot be written: {error}") from error


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
