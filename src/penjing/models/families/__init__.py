"""One file of facts per family of architectures, and the table that says which file describes which model type."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Any

FAMILIES: Mapping[str, str] = {
    "bert": "bert",
    "distilbert": "distilbert",
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
    "roberta": "roberta",
    "xlm-roberta": "roberta",
}
"""`model_type` of config.json -> name of the family file."""

CLASSIFIER = "ForSequenceClassification"
"""How the architectures of classifiers end, in `config["architectures"]`."""


def is_encoder(config: Mapping[str, Any]) -> bool:
    """Whether config.json describes an encoder: a model that reads a whole text at once and classifies it."""
    name = FAMILIES.get(config["model_type"])
    return name is not None and bool(read_family(name).get("encoder"))


def classifies(config: Mapping[str, Any]) -> bool:
    """Whether config.json describes an encoder that has a head for classes."""
    return any(name.endswith(CLASSIFIER) for name in config.get("architectures") or ())


def classes_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the classes, in the order of the logits; those of transformers where config.json has none."""
    named = config.get("id2label") or {number: f"LABEL_{number}" for number in range(config.get("num_labels") or 2)}
    return tuple(named[key] for key in sorted(named, key=int))


@cache
def read_family(name: str) -> dict[str, Any]:
    """The contents of a family file."""
    return tomllib.loads((resources.files(__name__) / f"{name}.toml").read_text(encoding="utf-8"))
