"""LoRA, rsLoRA and DoRA as they lie in PEFT's files, and what merging them into a weight means.

    LoRA    W' = W + s B A                   s = alpha / r,  rsLoRA: alpha / sqrt(r)      A (r, K), B (N, r)
    DoRA    W' = m * (W + s B A) / |W + s B A|     norms over the inputs, one per row;  m (N,)

Into a dense weight a change is merged as it is. Into a pruned one it is merged under its mask, or zeros would be lost.
Into codes it is not: the sum lies on no grid, and rounding it again loses what was learnt. Keep the adapter beside such
a base, or merge it into the dense model and quantise then.

Worked example. W = [[1, 0]], B = [[2]], A = [[3, 5]], alpha = 1, r = 1: W' = [[7, 10]]; pruned to kept [[1, 0]]: [[7, 0]].

Source: Hu et al. 2021 (arXiv:2106.09685); Kalajdzievski 2023 (arXiv:2312.03732); Liu et al. 2024, DoRA
(arXiv:2402.09353), equation 5.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from penjing.errors import CheckpointError, FormatError
from penjing.methods.adaptation.low_rank_change import scale_of
from penjing.representations import Dense, Masked, Representation

_PREFIX = "base_model.model."
_VARIANTS = {"init_lora_weights": (True, False, None, "gaussian"), "bias": ("none",), "modules_to_save": (None, [])}
"""Keys of adapter_config.json that change what the tensors mean, and the values for which they are what they seem."""


@dataclass(frozen=True)
class Adapter:
    """The change of one weight (N, K).

    down (r, K), up (N, r), scale s; magnitude (N,) for DoRA
    """

    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None = None

    def merged(self, weight: Tensor) -> Tensor:
        """W' (N, K) fp32."""
        changed = weight.float() + self.scale * (self.up.float() @ self.down.float())
        if self.magnitude is None:
            return changed
        return changed * (self.magnitude.float() / changed.norm(dim=1))[:, None]


def merge(name: str, weight: Representation, adapter: Adapter) -> Representation:
    """`weight` with the change in it: dense stays dense, pruned stays pruned. FormatError, with the reason, for codes."""
    if isinstance(weight, Dense):
        return Dense(adapter.merged(weight.values).to(weight.values.dtype))
    if isinstance(weight, Masked) and isinstance(weight.values, Dense):
        values = adapter.merged(weight.dense()) * weight.kept
        return Masked(Dense(values.to(weight.values.values.dtype)), weight.kept)
    raise FormatError(
        f"{name} is stored as codes, and a weight with an adapter in it lies on no grid; keep the adapter beside the "
        "model, or merge it into the dense model and quantise that"
    )


def read_adapter(directory: Path) -> dict[str, Adapter]:
    """The changes in a directory that PEFT wrote, by module name. Raises CheckpointError naming what is not LoRA."""
    try:
        config = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
        tensors = load_file(directory / "adapter_model.safetensors")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{directory}: not an adapter that PEFT wrote: {error}") from error
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{directory}: a {config.get('peft_type')} adapter; only LoRA, rsLoRA and DoRA are read")
    odd = [key for key, allowed in _VARIANTS.items() if config.get(key, allowed[0]) not in allowed]
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
