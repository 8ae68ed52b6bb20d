"""One file of facts per family of architectures, and the table that says which file describes which model type."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

FAMILIES: Mapping[str, str] = {
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gpt2": "gpt2",
    "gpt_neox": "gpt_neox",
    "granite": "llama",
    "llama": "llama",
    "mistral": "llama",
    "mixtral": "mixtral",
    "opt": "opt",
    "phi3": "phi3",
    "qwen2": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3_moe",
}
"""`model_type` of config.json -> name of the family file."""


@cache
def read_family(name: str) -> dict[str, Any]:
    """The contents of a family file."""
    return tomllib.loads((resources.files(__name__) / f"{name}.toml").read_text(encoding="utf-8"))
