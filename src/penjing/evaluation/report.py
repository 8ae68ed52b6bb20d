"""What a run did and what it cost, as data: `report.json` beside the weights, and the source of every page and table.

Field names are the keys of the JSON. `schema` counts changes that are not additions; a reader refuses other numbers.
"""

from __future__ import annotations

import json
import math
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from itertools import groupby
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from penjing.errors import CheckpointError
from penjing.evaluation.classification import Classification
from penjing.evaluation.metrics import Quality
from penjing.evaluation.windows import Protocol
from penjing.runtime.memory import CacheMemory

SCHEMA = 1
FILE_NAME = "report.json"
_BLOCK_NUMBER = re.compile(r"\.\d+\.")


@dataclass(frozen=True)
class Software:
    """Versions and machine of a run. `threads` is torch's; a package that is not installed has version ""."""

    penjing: str
    torch: str
    transformers: str
    python: str
    platform: str
    cpu: str
    threads: int

    @classmethod
    def here(cls) -> Software:
        """This process."""
        import torch

        return cls(
            penjing=_version("penjing"),
            torch=torch.__version__,
            transformers=_version("transformers"),
            python=platform.python_version(),
            platform=platform.platform(),
            cpu=_cpu(),
            threads=torch.get_num_threads(),
        )


@dataclass(frozen=True)
class Source:
    """The dense model. `bytes` of its stored weights; `parameters` counted once where tied."""

    label: str
    fingerprint: str
    model_type: str
    parameters: int
    bytes: int
    dtype: str


@dataclass(frozen=True)
class ModuleRow:
    """What became of one module.

    scheme           shorthand such as "W4 g64 symmetric"; "dense" when it was left alone
    bits             of a code; None when dense
    predicted_bytes  by the plan; `bytes` is what was written
    error            relative, of the kind in `error_kind`: "output" is ||(W - W')X|| / ||WX|| over the calibration
                     inputs, "weight" is ||W - W'|| / ||W||; None when nothing changed
    tokens           calibration tokens this module saw
    notes            anything that is not as asked: damping raised, left dense and why
    """

    name: str
    kind: str
    block: int | None
    shape: tuple[int, ...]
    steps: tuple[str, ...]
    scheme: str
    bits: float | None
    predicted_bytes: int
    bytes: int
    error: float | None = None
    error_kind: str = ""
    tokens: int = 0
    notes: tuple[str, ...] = ()

    @property
    def role(self) -> str:
        """The name without its block: "self_attn.q_proj" of "model.layers.3.self_attn.q_proj"."""
        return self.name if self.block is None else _BLOCK_NUMBER.split(self.name, maxsplit=1)[-1]


@dataclass(frozen=True)
class Skipped:
    """A module that was left dense, or a block that was removed, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Report:
    """A finished run.

    recipe           as written, every default spelled out
    format           name of the format on disk
    source           the dense model
    modules          one row per module of the result, in the order of the forward pass
    predicted_bytes  of the weight files, by the plan; `bytes` is what lies on disk
    software         versions and machine
    calibration      the text the methods saw; None when no step looks at activations
    sample           the beginning of a calibration window, as a person reads it
    quality          None when the result was not measured; holds the dense model's perplexity beside its own
    protocol         how `quality` was measured
    classification   the same of a classifier of texts, and how it was measured; None for other models
    kv_cache         what the recipe's quantised key-value cache holds after a window; None without one
    block_errors     relative error of each block's output
    skipped          what was left dense or removed, with reasons
    made             one entry per model that was made between two walks: the step and what it says of its work
    peak_memory      bytes above the baseline of the loaded libraries; None where it cannot be read
    seconds          wall time of each stage
    verification     outcome of loading the result back
    """

    recipe: dict[str, Any]
    format: str
    source: Source
    modules: tuple[ModuleRow, ...]
    predicted_bytes: int
    bytes: int
    software: Software
    calibration: Protocol | None = None
    sample: str = ""
    quality: Quality | None = None
    protocol: Protocol | None = None
    classification: Classification | None = None
    kv_cache: CacheMemory | None = None
    block_errors: tuple[float, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    made: tuple[dict[str, Any], ...] = ()
    peak_memory: int | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    verification: dict[str, Any] = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def bits_per_weight(self) -> float:
        """Bits on disk for each parameter of the dense model, scales and dense tensors included."""
        return 8 * self.bytes / self.source.parameters

    @property
    def methods(self) -> list[str]:
        """The recipe's methods in order."""
        return method_names(self.recipe)

    @property
    def summary(self) -> str:
        """The run in a few words, for titles: "demo, gptq, compressed-tensors"."""
        return f"{self.source.label}, {' + '.join(self.methods) or 'no step'}, {self.format}"

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON; infinite or undefined numbers become null."""
        plain: dict[str, Any] = _ADAPTER.dump_python(self, mode="json")
        plain["bits_per_weight"] = self.bits_per_weight
        if self.protocol:
            plain["protocol"]["sentence"] = self.protocol.sentence()
        if self.classification:
            plain["classification"]["sentence"] = self.classification.sentence()
        return _finite(plain)

    def to_json(self) -> str:
        """The text of `report.json`."""
        return json.dumps(self.as_dict(), indent=2, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, name: str = FILE_NAME) -> Report:
        """Read `to_json` back. Raises CheckpointError naming the key that does not fit, or an unknown schema."""
        try:
            return _ADAPTER.validate_json(text)
        except ValidationError as error:
            problem = error.errors()[0]
            where = ".".join(map(str, problem["loc"])) or "the whole file"
            raise CheckpointError(f"{name}: not a report of penjing: {where}: {problem['msg']}") from error

    def __post_init__(self) -> None:
        if self.schema != SCHEMA:
            raise ValueError(f"schema {self.schema} of the report is unknown; this version reads {SCHEMA}")


def read_report(directory: str | Path) -> Report:
    """The report of a directory that penjing wrote (or of a report.json). Raises CheckpointError."""
    path = Path(directory)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist: not a directory that penjing wrote, or its run did not finish")
    return Report.from_json(path.read_text(encoding="utf-8"), str(path))


_ADAPTER = TypeAdapter(Report)


def _finite(value: Any) -> Any:
    """`value` with every NaN and infinity replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def _cpu() -> str:
    """Model name and number of cores this process may use."""
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = re.findall(r"^model name\s*:\s*(.+)$", info.read_text(encoding="utf-8", errors="replace"), re.MULTILINE)
        name = names[0] if names else name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {cores} cores"


def method_names(recipe: Mapping[str, Any]) -> list[str]:
    """Methods of a recipe in order; one that several steps in a row give to different linears is named once."""
    return [name for name, _ in groupby(step["method"] for step in recipe.get("steps", ()))]
