"""Architectures: where everything is in a model, and the live model itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from penjing.checkpoint.base import TensorSpec
from penjing.models.check import check_specs, check_tied_head
from penjing.models.families import FAMILIES
from penjing.models.inferred import inferred_layout
from penjing.models.known import known_layout
from penjing.models.layout import InputGroup, Layout, ModuleSpec
from penjing.models.sharing import CONFIG_KEY, with_sharing

if TYPE_CHECKING:
    from penjing.models.build import build_model, fill, find, release

__all__ = [
    "InputGroup",
    "Layout",
    "ModuleSpec",
    "build_model",
    "check_tied_head",
    "fill",
    "find",
    "layout_of",
    "release",
]


def layout_of(
    config: Mapping[str, Any], specs: Mapping[str, TensorSpec] | None = None, *, trust_remote_code: bool = False
) -> Layout:
    """Where everything is in the model that `config` (config.json) describes.

    Families with a file in `families/` need neither torch nor transformers; any other decoder is inferred from the
    model that transformers builds. `specs`, when given, are checked against the layout (not for a checkpoint that is
    already quantised: its format knows its tensors). Raises CheckpointError.
    """
    known = config.get("model_type") in FAMILIES
    layout = known_layout(config) if known else inferred_layout(config, trust_remote_code=trust_remote_code)
    layout = with_sharing(layout, config.get(CONFIG_KEY))
    if specs is not None and "quantization_config" not in config:
        check_specs(layout, specs)
    return layout


def __getattr__(name: str) -> Any:
    """`build_model` and its companions import torch, so they are imported when first asked for."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from penjing.models import build

    return getattr(build, name)
