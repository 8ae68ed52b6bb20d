"""Reading the adapters that PEFT writes: adapter_config.json and adapter_model.safetensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from penjing.checkpoint import load_shard
from penjing.errors import CheckpointError
from penjing.methods.adaptation.lora import Adapter
from penjing.methods.adaptation.low_rank_change import scale_of

_PREFIX = "base_model.model."
_PLAIN: Mapping[str, tuple[Any, ...]] = {"bias": ("none",), "modules_to_save": (None, [])}
"""Keys of adapter_config.json that may add more tensors, and the values for which they do not."""


def read_adapter(directory: Path) -> dict[str, Adapter]:
    """The changes in a directory that PEFT wrote, by module name.

    Raises CheckpointError naming the damaged file, or what is not LoRA.
    """
    try:
        config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}: not an adapter that PEFT wrote: {error}") from error
    tensors = load_shard(directory / "adapter_model.safetensors")
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{directory}: a {config.get('peft_type')} adapter; only LoRA, rsLoRA and DoRA are read")
    odd = [key for key, allowed in _PLAIN.items() if config.get(key, allowed[0]) not in allowed]
    if odd:
        told = ", ".join(f"{key}: {config[key]}" for key in odd)
        raise CheckpointError(f"{directory}: the adapter is more than two matrices per linear ({told})")
    return {
        name: _adapter(name, config, tensors)
        for name in (key.removeprefix(_PREFIX).removesuffix(".lora_A.weight") for key in tensors if ".lora_A." in key)
    }


def _adapter(name: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Adapter:
    def of(part: str) -> Tensor | None:
        return tensors.get(f"{_PREFIX}{name}.{part}")

    down, up = of("lora_A.weight"), of("lora_B.weight")
    if down is None or up is None or down.shape[0] != up.shape[1]:
        raise CheckpointError(f"adapter of {name}: lora_A and lora_B do not fit each other")
    alpha = _pattern(name, config.get("alpha_pattern"), config["lora_alpha"])
    magnitude = of("lora_magnitude_vector") if config.get("use_dora") else None
    if config.get("use_dora") and magnitude is None:
        magnitude = of("lora_magnitude_vector.weight")
    return Adapter(down, up, scale_of(alpha, len(down), bool(config.get("use_rslora"))), magnitude)


def _pattern(name: str, patterns: Mapping[str, float] | None, default: float) -> float:
    """The value for a module whose name ends with one of the patterns."""
    found = (value for key, value in (patterns or {}).items() if name == key or name.endswith("." + key))
    return next(found, default)
