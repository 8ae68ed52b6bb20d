"""A digest of a model on disk that is quick to take: headers in full, contents by sample."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

SAMPLES = 16
SAMPLE_BYTES = 64 * 1024


def fingerprint(config: Mapping[str, Any], weights: Iterable[Path]) -> str:
    """SHA-256 of the config and, for each file, of its name, size and 16 pieces of 64 KiB spread from start to end.

    The first piece covers a safetensors header of up to 64 KiB; callers add longer ones through `config`.
    """
    digest = hashlib.sha256(json.dumps(config, sort_keys=True).encode())
    for path in sorted(weights):
        size = path.stat().st_size
        digest.update(f"\0{path.name}\0{size}\0".encode())
        with path.open("rb") as file:
            for start in sorted({max(size - SAMPLE_BYTES, 0) * piece // (SAMPLES - 1) for piece in range(SAMPLES)}):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()
