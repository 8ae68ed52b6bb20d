"""The live model: built by transformers without weights, with every module under its name in the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from penjing.errors import CheckpointError
from penjing.models.experts import separate_experts
from penjing.models.families import is_encoder, read_family
from penjing.models.layout import Layout

TIED = "_penjing_tied"
"""Attribute of an embedding: the modules whose weight is the embedding's."""


def build_model(config: Mapping[str, Any], layout: Layout, *, trust_remote_code: bool = False) -> nn.Module:
    """The causal language model in evaluation mode, parameters on the meta device, computed buffers real.

    Every module of `layout` is found by its name (`find`), also where transformers calls it otherwise or fuses it.
    """
    model = build_meta(config, trust_remote_code=trust_remote_code)
    _compute_buffers(model)
    if layout.family != "inferred":
        _rename(model, layout, read_family(layout.family))
    if layout.tied:
        object.__setattr__(find(model, layout.embedding.name), TIED, [find(model, layout.head.name)])
    return model.eval().requires_grad_(False)


def build_meta(config: Mapping[str, Any], *, trust_remote_code: bool = False) -> Any:
    """The transformers model with everything on the meta device: a language model, or a classifier where the config is
    an encoder's. Raises CheckpointError if it cannot be built.

    Computed buffers are laid out in fp32 whatever the dtype of the weights: the models cast them where they are used.
    """
    return _build(config, "meta", torch.float32, trust_remote_code)


def build_random(
    config: Mapping[str, Any], device: torch.device, dtype: torch.dtype, *, trust_remote_code: bool = False
) -> Any:
    """The transformers model as it is without Penjing, with small random weights: for measuring time."""
    model = _build(config, device, dtype, trust_remote_code)
    for parameter in model.parameters():
        parameter.data.uniform_(-0.02, 0.02)
    return model.eval().requires_grad_(False)


def _build(config: Mapping[str, Any], device: str | torch.device, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers.initialization import no_init_weights
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    with quiet(), torch.device(device), no_init_weights():
        try:
            remote = trust_remote_code and "auto_map" in config and config["model_type"] not in CONFIG_MAPPING_NAMES
            settings = _settings(config, remote)
            kind = AutoModelForSequenceClassification if is_encoder(config) else AutoModelForCausalLM
            return kind.from_config(settings, dtype=dtype, trust_remote_code=remote)
        except Exception as error:  # configuration classes raise whatever they like
            raise CheckpointError(f"transformers cannot build a {config['model_type']!r} model: {error}") from error


def complete_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with every default of its class spelled out, in the words of the installed transformers."""
    with quiet():
        return dict(_settings(config, False).to_dict())


def check_config(config: Mapping[str, Any], *, trust_remote_code: bool = False) -> str:
    """Why transformers refuses a config; empty if it takes it. Nothing is built."""
    remote = trust_remote_code and "auto_map" in config
    try:
        _settings(config, remote)
    except Exception as error:  # configuration classes raise whatever they like
        return " ".join(str(error).split())
    return ""


def _settings(config: Mapping[str, Any], remote: bool) -> Any:
    """The configuration object; without a key-value cache and without the quantiser that config.json may name."""
    from transformers import AutoConfig

    plain = {key: value for key, value in config.items() if key not in ("quantization_config", "use_cache")}
    model_type = plain.pop("model_type")
    if remote:
        return AutoConfig.from_pretrained(plain["_name_or_path"], trust_remote_code=True, use_cache=False)
    return AutoConfig.for_model(model_type, **plain, use_cache=False)


@contextmanager
def quiet() -> Iterator[None]:
    """transformers comments on token ids and the like; what matters is said by our own errors and progress."""
    from transformers.utils import logging

    before, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


def _compute_buffers(model: nn.Module) -> None:
    """Give non-persistent buffers (rotary tables, embedding scales) the values the model's own code computes.

    They start as NaN; one that stays NaN was not computed. Raises CheckpointError naming it.
    """
    owners = [module for module in model.modules() if module._non_persistent_buffers_set]
    for module in owners:
        for name in module._non_persistent_buffers_set:
            buffer = module._buffers[name]
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = _blank(buffer)
        _model_of(model, module)._init_weights(module)
    for name, buffer in model.named_buffers():
        if not buffer.is_meta and buffer.is_floating_point() and buffer.isnan().any():
            raise CheckpointError(f"{type(model).__name__} does not say how its buffer {name!r} is computed")


def _blank(buffer: Tensor) -> Tensor:
    blank = torch.empty_like(buffer, device="cpu")
    return blank.fill_(torch.nan) if blank.is_floating_point() else blank.zero_()


def _model_of(model: nn.Module, module: nn.Module) -> Any:
    """The innermost transformers model that holds `module`: the one that knows how to initialise it."""
    from transformers import PreTrainedModel

    owner = model
    for part in model.modules():
        if isinstance(part, PreTrainedModel) and any(inner is module for inner in part.modules()):
            owner = part
    return owner


def _rename(model: nn.Module, layout: Layout, family: Mapping[str, Any]) -> None:
    """Give modules their names in the checkpoint, and experts a matrix each."""
    for old, new in family.get("rename", {}).items():
        _move(model, old, new)
    for index in range(layout.blocks):
        block = find(model, layout.block_name(index))
        for old, new in family.get("rename_in_block", {}).items():
            _move(block, old, new)
        if "experts" in family:
            separate_experts(block, **family["experts"])


def _move(parent: nn.Module, old: str, new: str) -> None:
    """Rename a child. Its parent's code still finds it as a plain attribute under the old name."""
    child = parent._modules.pop(old)
    parent.add_module(new, child)
    object.__setattr__(parent, old, child)


def keep_probabilities(model: Any) -> None:
    """Make attention compute its probabilities one step after another and return them, as fused kernels do not."""
    model.config._attn_implementation = "eager"


def find(model: nn.Module, name: str) -> nn.Module:
    """The live module that a layout calls `name`. Raises CheckpointError if there is none."""
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise CheckpointError(f"{type(model).__name__} has no module {name!r}") from error


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put values in place of a module's own parameters, by their names in it ("weight", "bias").

    The tensors are used as they are, not copied. A head tied to an embedding gets its weight with the embedding.
    Raises CheckpointError when a name or a shape is not the module's.
    """
    for name, tensor in tensors.items():
        old = module._parameters.get(name, module._buffers.get(name))
        if old is None:
            raise CheckpointError(f"{type(module).__name__} has no parameter {name!r}")
        if old.shape != tensor.shape:
            raise CheckpointError(
                f"{type(module).__name__}.{name} takes shape {list(old.shape)}, given {list(tensor.shape)}"
            )
        _put(module, name, tensor)


def release(module: nn.Module) -> None:
    """Send a module's own parameters, and those tied to them, back to the meta device."""
    for name, parameter in module._parameters.items():
        if parameter is not None:
            _put(module, name, parameter.data.to("meta"))


def _put(module: nn.Module, name: str, tensor: Tensor) -> None:
    if name in module._buffers:
        module._buffers[name] = tensor
        return
    parameter = nn.Parameter(tensor, requires_grad=False)
    module._parameters[name] = parameter
    if name == "weight":
        for other in getattr(module, TIED, []):
            other._parameters[name] = parameter
