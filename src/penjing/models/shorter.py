"""The config of a model with fewer blocks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def shortened(config: Mapping[str, Any], blocks: int, keep: Sequence[int]) -> dict[str, Any]:
    """`config` of `blocks` blocks for those in `keep` alone: the count, and every list with one entry per block."""
    config = dict(config)
    if "layer_types" not in config and (layer_types := _default_layer_types(config)):
        config["layer_types"] = layer_types
    for key, value in config.items():
        if key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers"):
            config[key] = len(keep)
        elif isinstance(value, list) and len(value) == blocks:
            config[key] = [value[index] for index in keep]
    return config


def _default_layer_types(config: Mapping[str, Any]) -> list[str] | None:
    """Kinds of attention per block that the model class would derive from the block's number."""
    from transformers import AutoConfig

    model_type = config["model_type"]
    full = AutoConfig.for_model(model_type, **{key: value for key, value in config.items() if key != "model_type"})
    return getattr(full, "layer_types", None)
