"""Whole models in memory for training: from any checkpoint that Penjing reads, and back into a stock directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from penjing.checkpoint import write_bytes
from penjing.checkpoint.base import Checkpoint
from penjing.errors import CheckpointError
from penjing.models import layout_of
from penjing.models.build import build_meta, quiet
from penjing.models.families import classifies, is_encoder

_NOT_WRITTEN = ("torch_dtype", "_name_or_path")


def load_model(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32, *, trust_remote_code: bool = False) -> Any:
    """The transformers model of a checkpoint of plain tensors, in evaluation mode and without gradients.

    An encoder without a head for classes gets a fresh one.

    Raises CheckpointError when its tensors are not those of the model, or are packed codes.
    """
    if "quantization_config" in checkpoint.config:
        raise CheckpointError(f"{checkpoint.label} holds packed codes; training starts from plain tensors")
    blank = build_meta(checkpoint.config, trust_remote_code=trust_remote_code)
    tensors = {name: checkpoint.load(name) for name in checkpoint.specs()}
    fresh: set[str] = set()
    if is_encoder(checkpoint.config):
        tensors, fresh = _of_classifier(checkpoint, blank, tensors)
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, told = type(blank).from_pretrained(
            None, config=blank.config, state_dict=tensors, dtype=dtype, output_loading_info=True
        )
    told["missing_keys"] = set(told["missing_keys"]) - fresh
    odd = {key: sorted(told[key])[:3] for key in ("missing_keys", "mismatched_keys", "unexpected_keys") if told[key]}
    if odd:
        raise CheckpointError(f"{checkpoint.label}: tensors do not fit the model: {odd}")
    return model.eval().requires_grad_(False)


def _of_classifier(
    checkpoint: Checkpoint, model: nn.Module, tensors: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], set[str]]:
    """Those tensors of an encoder that its classifier has, and the names of those that begin fresh."""
    names = model.state_dict().keys()
    expected = {name for module in layout_of(checkpoint.config).modules for name in module.tensor_names()}
    return {name: tensors[name] for name in names if name in tensors}, set(names) - expected


def zeros_of(model: nn.Module) -> dict[str, Tensor]:
    """bool masks, false at exact zeros, of the matrices that have any, by parameter name. Embeddings have none."""
    inside = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    masks = {}
    for name, parameter in model.named_parameters():
        if parameter.ndim >= 2 and id(parameter) not in inside:
            kept = parameter.detach() != 0
            if not kept.all():
                masks[name] = kept
    return masks


def save_model(
    model: Any, checkpoint: Checkpoint, directory: Path, dtype: torch.dtype, config: Mapping[str, Any] | None = None
) -> None:
    """Write `model` as a stock Hugging Face directory, whole or not at all.

    config.json is `config`, by default that of `checkpoint`, whose other files are copied. What is tied is stored once.
    Of an encoder that does not classify the body is written, without a head.
    """
    partial = directory.with_name(f".{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    wanted = config or checkpoint.config
    written = model.base_model if is_encoder(wanted) and not classifies(wanted) else model
    with quiet():
        written.to(dtype).save_pretrained(partial)
    entries = {key: value for key, value in wanted.items() if key not in _NOT_WRITTEN}
    entries["dtype"] = str(dtype).removeprefix("torch.")
    for name, content in checkpoint.files():
        write_bytes(partial / name, content)
    write_bytes(partial / "config.json", (json.dumps(entries, indent=2) + "\n").encode())
    shutil.rmtree(directory, ignore_errors=True)
    partial.replace(directory)
