"""An adapter put into the weights of a model for good, as a new stock directory; and what an adapter consists of."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from penjing.checkpoint import open_checkpoint
from penjing.errors import FormatError, OutputError
from penjing.training.adapters import Adapters
from penjing.training.models import load_model, save_model
from penjing.training.peft_files import read_adapter


@dataclass(frozen=True)
class Merged:
    """What was merged and where it lies. `pruned_linears` had zeros, which stayed."""

    model: str
    adapter: str
    directory: str
    linears: int
    pruned_linears: int
    dtype: str

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def merge_adapter(
    model: str | Path, adapter: str | Path, output: str | Path, *, trust_remote_code: bool = False
) -> Merged:
    """Write `model` with `adapter` (LoRA, rsLoRA or DoRA, as PEFT saves it) merged to `output`, in the model's dtype.

    Weights of a pruned base that are zero stay zero. Raises FormatError, with the reason, for a base of codes;
    OutputError when `output` holds something; CheckpointError when model or adapter cannot be read or do not fit.
    """
    directory = Path(output)
    if directory.exists() and any(directory.iterdir()):
        raise OutputError(f"{directory} is not empty; name a new directory")
    checkpoint = open_checkpoint(model, trust_remote_code=trust_remote_code)
    told = checkpoint.config.get("quantization_config")
    if told is not None:
        raise FormatError(
            f"{checkpoint.label} holds codes ({told.get('quant_method')}), and a weight with an adapter in it lies on "
            "no grid: rounding it again would lose what was learnt. Keep the adapter beside the model (PEFT loads "
            "both), or merge it into the dense model and quantise that"
        )
    loaded = load_model(checkpoint, trust_remote_code=trust_remote_code)
    adapters = Adapters(loaded)
    adapters.add("adapter", Path(adapter))
    pruned = adapters.pruned("adapter")
    adapters.use("adapter")
    named = str(checkpoint.config.get("dtype") or checkpoint.config.get("torch_dtype") or "float32")
    dtype = named.removeprefix("torch.")
    save_model(loaded, checkpoint, directory, getattr(torch, dtype))
    linears = len(adapters.linears("adapter"))
    return Merged(checkpoint.label, str(adapter), str(directory), linears, len(pruned), dtype)


def describe_adapter(adapter: str | Path) -> dict[str, Any]:
    """What is in a directory that PEFT wrote: kind, ranks, linears, parameters. Raises CheckpointError."""
    found = read_adapter(Path(adapter))
    parts = [tensor for each in found.values() for tensor in (each.down, each.up, each.magnitude) if tensor is not None]
    directed = any(each.magnitude is not None for each in found.values())
    return {
        "adapter": str(adapter),
        "kind": "DoRA" if directed else "LoRA",
        "linears": len(found),
        "ranks": sorted({len(each.down) for each in found.values()}),
        "scales": sorted({each.scale for each in found.values()}),
        "parameters": sum(tensor.numel() for tensor in parts),
        "bytes": sum(tensor.nbytes for tensor in parts),
    }
