"""Reading the header of a GGUF file with bounds on everything, so that a damaged file is an error and not a hang.

    "GGUF"  u32 version  u64 tensors  u64 keys
    keys    times: string name, u32 type, value
    tensors times: string name, u32 n_dims, u64 dims (innermost first), u32 quantisation type, u64 offset
    padding to general.alignment, then the tensors' data, offsets counted from here

Strings are a u64 length and UTF-8 bytes; arrays are a u32 type, a u64 count and the values.
(Specification: docs/gguf.md of the ggml project.)
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penjing.errors import CheckpointError

if TYPE_CHECKING:
    from gguf.constants import GGMLQuantizationType

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
LARGEST_RANK = 4


@dataclass(frozen=True)
class GGUFTensor:
    """Where a tensor lies: `shape` outermost first, `start` and `nbytes` in the file."""

    name: str
    shape: tuple[int, ...]
    quantization: GGMLQuantizationType
    start: int
    nbytes: int


@dataclass(frozen=True)
class GGUFHeader:
    """All keys and all tensors of a GGUF file."""

    keys: dict[str, Any]
    tensors: dict[str, GGUFTensor]


def read_gguf_header(path: Path) -> GGUFHeader:
    """Read and check the header. Raises CheckpointError that names the file and what is wrong with it."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data, path).header()
    except (OSError, ValueError) as error:  # mmap of an empty file is a ValueError
        raise CheckpointError(f"{path}: not a readable GGUF file: {error}") from error


class _Reader:
    """A position in the file, and the little-endian values that follow it."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data, self._path, self._position = data, path, 0

    def header(self) -> GGUFHeader:
        if self._bytes(4) != b"GGUF":
            raise CheckpointError(f"{self._path}: does not start with GGUF; it is some other kind of file")
        version = self._one("I")
        if version not in (2, 3):
            raise CheckpointError(f"{self._path}: GGUF version {version}; versions 2 and 3 (little-endian) can be read")
        tensor_count, key_count = self._one("Q"), self._one("Q")
        keys = {}
        for _ in range(key_count):
            name = self._string()
            keys[name] = self._value(self._one("I"))
        alignment = keys.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise CheckpointError(f"{self._path}: general.alignment is {alignment!r}; the file is corrupt")
        infos = [self._tensor() for _ in range(tensor_count)]
        origin = -(-self._position // alignment) * alignment
        tensors = {}
        for name, shape, quantization, offset in infos:
            if name in tensors:
                raise CheckpointError(f"{self._path}: tensor {name!r} occurs twice")
            tensors[name] = self._place(name, shape, quantization, origin + offset)
        return GGUFHeader(keys, tensors)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string()
        rank = self._one("I")
        if rank > LARGEST_RANK:
            raise CheckpointError(f"{self._path}: tensor {name!r} has {rank} dimensions; the file is corrupt")
        shape = tuple(self._one("Q") for _ in range(rank))[::-1]
        return name, shape, self._one("I"), self._one("Q")

    def _place(self, name: str, shape: tuple[int, ...], kind: int, start: int) -> GGUFTensor:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType  # an extra, which engines' tables do without

        where = f"{self._path}: tensor {name!r}"
        try:
            quantization = GGMLQuantizationType(kind)
        except ValueError as error:
            raise CheckpointError(f"{where} has unknown quantisation type {kind}; a newer gguf may know it") from error
        block, block_bytes = GGML_QUANT_SIZES[quantization]
        if shape and shape[-1] % block:
            raise CheckpointError(
                f"{where}: rows of {shape[-1]} do not divide into {quantization.name} blocks of {block}"
            )
        nbytes = math.prod(shape) // block * block_bytes
        if start + nbytes > len(self._data):
            raise CheckpointError(
                f"{where} ends at byte {start + nbytes:,} of {len(self._data):,}: truncated; download it again"
            )
        return GGUFTensor(name, shape, quantization, start, nbytes)

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._string()
        if kind == ARRAY:
            return self._array()
        return self._one(self._code(kind))

    def _array(self) -> list[Any]:
        kind, count = self._one("I"), self._one("Q")
        if kind == STRING:
            return [self._string() for _ in range(count)]
        if kind == ARRAY:
            raise CheckpointError(f"{self._path}: nested arrays are not part of GGUF; the file is corrupt")
        code = self._code(kind)
        return list(struct.unpack(f"<{count}{code}", self._bytes(count * struct.calcsize(code))))

    def _code(self, kind: int) -> str:
        if kind not in SCALARS:
            raise CheckpointError(f"{self._path}: unknown GGUF value type {kind}; the file is corrupt")
        return SCALARS[kind]

    def _string(self) -> str:
        return self._bytes(self._one("Q")).decode("utf-8", errors="replace")

    def _one(self, code: str) -> Any:
        return struct.unpack("<" + code, self._bytes(struct.calcsize("<" + code)))[0]

    def _bytes(self, count: int) -> bytes:
        end = self._position + count
        if end > len(self._data):
            raise CheckpointError(f"{self._path}: the header runs past the end of the file: truncated or corrupt")
        piece = self._data[self._position : end]
        self._position = end
        return piece
